"""Plain causal attention through FlashAttention 3, where it is installed, against what runs without it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from decode_generate import model_8b
from prefill_chunks import K, in_turn
from prefill_layers import row
from prefill_lengths import first_token
from torch import Tensor

import hf_longctx as lc
from hf_longctx.kernels import dispatch, flash, ops

SIZES = ((512, 0), (K, 0), (2 * K, 0), (4 * K, 0), (16 * K, 0), (128 * K, 0), (4 * K, 32 * K), (16 * K, 112 * K))
PROMPTS = (4 * K, 32 * K, 128 * K)


def asked(call: Callable[[], Any], least: int) -> Callable[[], Any]:
    """The call, in which FlashAttention 3 is asked from so many keys on."""

    def run() -> Any:
        own, flash.LEAST = flash.LEAST, least
        try:
            return call()
        finally:
            flash.LEAST = own

    return run


@torch.no_grad()
def flash_rows(text: Callable[[int], list[Tensor]]) -> Iterator[dict[str, Any]]:
    """A row for each size of a layer and each prompt; text: queries, keys and values of so many tokens."""
    without = flash.missing()
    if without is not None:
        raise SystemExit(f"flash: FlashAttention 3 {without}. Install it, or leave `flash` out.")
    for tokens, before in SIZES:
        q, k, v = text(tokens + before)
        q = q[:, :, before:]
        if before:
            k, v = k.contiguous(), v.contiguous()  # as a cache has them
        attend = partial(ops.attend_blocks, q, k, v, ops.Logits(q.shape[3] ** -0.5), ops.Visibility(), None)
        times = in_turn({"with": asked(attend, 0), "without": asked(attend, 1 << 40)})
        attend()
        value, base = times["with"], times["without"]
        found = row(f"{tokens} tokens after {before // K}K", tokens, value, "without it", base, None, None, None)
        found["shapes"]["before"] = before
        yield found | {"unit": "ms", "backend": dispatch.last_used()["attend_blocks"]}
    model = model_8b()
    with lc.patched(model, lc.Dense()):
        for tokens in PROMPTS:
            ids = torch.randint(1000, (1, tokens), device=model.device)
            run = [asked(lambda ids=ids: first_token(model, ids), least) for least in (flash.LEAST, 1 << 40)]  # type: ignore[misc]
            each = [(run[0](), run[1]()) for _ in range(3 if tokens > 16 * K else 8)][1:]
            value, base = (min(x) for x in zip(*each, strict=True))
            found = row(f"TTFT {tokens // K}K, dense", tokens, value, "without it", base, None, None, None)
            yield found
