"""Chunks of a prompt that read all before them, against torch's fused attention; and prompts cut into such chunks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from decode_generate import model_8b
from prefill_generate import first_token
from prefill_layers import row
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import hf_longctx as lc
from hf_longctx import prompt
from hf_longctx.kernels import dispatch, ops

K = 1024
CHUNKS = tuple((tokens * K, before * K) for tokens in (4, 8, 16) for before in (0, 32, 112))
PIECES = (8 * K, 16 * K, 32 * K)
ROUNDS, LEAST_MS = 9, 4.0


def in_turn(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of each; they take turns, and each follows each, so that a warm GPU's clock is that of all.

    Short ones are called some times in a row: the host is ahead of the device, as it is in a model.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    repeats, names = 1, list(calls)
    for number in range(ROUNDS + 2):
        for name in names:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                calls[name]()
            stop.record()
            stop.synchronize()
            found[name].append(start.elapsed_time(stop) / repeats)
        names = names[::-1] if number % 2 else names[1:] + names[:1]
        if number == 1:
            repeats = max(1, round(LEAST_MS / min(times[-1] for times in found.values())))
    return {name: statistics.median(times[2:]) for name, times in found.items()}


def of_torch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Its causal attention; of queries that follow keys that is flash attention, where causal means the last ones."""
    if q.shape[2] == k.shape[2]:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    out: Tensor = flash(q, k, v, 0.0, True, scale=q.shape[3] ** -0.5)[0]
    return out


@torch.no_grad()
def chunk_rows(text: Callable[[int], list[Tensor]], fa3: bool) -> Iterator[dict[str, Any]]:
    """A row for each chunk; text: queries, keys and values of so many tokens."""
    for tokens, before in CHUNKS:
        q, k, v = text(tokens + before)
        q = q[:, :, before:]
        if before:
            k, v = k.contiguous(), v.contiguous()  # as a cache has them
        logits = ops.Logits(q.shape[3] ** -0.5)
        ours = partial(ops.attend_blocks, q, k, v, logits, ops.Visibility(), None)
        calls: dict[str, Callable[[], Any]] = {"ours": ours, "torch": partial(of_torch, q, k, v)}
        if fa3:
            moved = [x.transpose(1, 2) for x in (q, k, v)]
            calls["fa3"] = partial(torch.ops.flash_attn_3.fwd, *moved, softmax_scale=logits.scale, is_causal=True)
        times = in_turn(calls)
        value, base = times["ours"], times["torch"]
        flops = 4 * q.shape[1] * q.shape[3] * tokens * (before + (tokens + 1) / 2)
        case = f"{tokens // K}K tokens after {before // K}K, dense"
        found = row(case, tokens, value, "dense, causal, torch", base, ">= 0.97x", base / value >= 0.97, None)
        found["shapes"]["before"] = before
        found |= {"tflops": round(flops / value * 1e-9, 1), "backend": dispatch.last_used()["attend_blocks"]}
        yield found | ({"fa3_value": round(times["fa3"], 4)} if fa3 else {})


@torch.no_grad()
def piece_rows(tokens: int) -> Iterator[dict[str, Any]]:
    """Seconds to the first token, and the most memory, by the tokens of a piece; against pieces as they are."""
    model, own = model_8b(), prompt.PIECE
    methods = {"dense": lc.Dense(), "xattention": lc.XAttention(tau=0.066, dense_below=0)}
    taken: dict[tuple[str, int], tuple[float, float, float | None]] = {}
    for name, method in methods.items():
        for size in PIECES:
            prompt.PIECE = size
            taken[name, size] = first_token(model, method, tokens)
    prompt.PIECE = own
    for (name, size), (seconds, held, read) in taken.items():
        base = taken[name, own][0]
        found = row(f"TTFT {tokens // K}K, {name}, pieces of {size // K}K", tokens, seconds, "", base, None, None, read)
        found |= {"unit": "s", "baseline": f"pieces of {own // K}K", "held_gb": round(held, 3)}
        yield found | {"shapes": {"rows": 1, "tokens": tokens, "piece": size}}
