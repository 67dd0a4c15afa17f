"""Windowed heads never form a T x S tensor, on any backend; without a window no block is larger than its bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_longctx.kernels import ops
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.reference import attend


class Largest(TorchDispatchMode):
    """Remembers the most elements of any tensor that an operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def largest(backend: str, tokens: int, see: ops.Visibility, turns: ops.Turns | None) -> int:
    q, k = torch.randn(1, 2, tokens, 4), torch.randn(1, 1, tokens, 4)
    with use_backend(backend), torch.no_grad(), Largest() as seen:
        ops.attend_blocks(q, k, k, ops.Logits(0.5), see, turns)
    return seen.elements


@pytest.mark.parametrize("explicit", [False, True], ids=["aligned", "positions"])
@pytest.mark.parametrize(("backend", "turned"), [("torch", False), ("reference", False), ("reference", True)])
def test_windowed_heads_take_memory_in_proportion_to_the_text(backend: str, turned: bool, explicit: bool) -> None:
    def run(tokens: int) -> int:
        pos = torch.arange(tokens)[None]
        see = ops.Visibility(4, 60, pos if explicit else None, pos if explicit else None)
        turns = ops.Turns(pos.clamp(max=63), 60, 4, torch.ones(2)) if turned else None
        return largest(backend, tokens, see, turns)

    small, large = run(4096), run(8192)
    assert large <= 2 * small
    assert large < 8192 * 8192 / 32


def test_without_a_window_a_block_keeps_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    bound, heads, tokens = 1 << 17, 2, 2048
    monkeypatch.setattr(attend, "LOGITS_PER_BLOCK", bound)
    assert largest("reference", tokens, ops.Visibility(), None) <= max(bound, heads * tokens * 16)


@pytest.mark.cuda
def test_queries_that_follow_keys_are_one_call_where_flash_attention_takes_them() -> None:
    """Errors are at most twice those of the definition in the same dtype, and 2 ulp; no mask is made."""
    made = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(2, tokens, heads, 64, generator=made, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for heads, tokens in ((4, 777), (2, 3001), (2, 3001))
    )
    see, logits = ops.Visibility(), ops.Logits(0.125)
    with use_backend("torch"), torch.no_grad(), Largest() as seen:
        got = ops.attend_blocks(q, k, v, logits, see, None)
    assert seen.elements < 777 * 3001
    with use_backend("reference"):
        same = ops.attend_blocks(q, k, v, logits, see, None)
        exact = ops.attend_blocks(*(x.double() for x in (q, k, v)), logits, see, None)
    ulp = torch.finfo(q.dtype).eps * float(exact.abs().max())
    yardstick = float((same.double() - exact).abs().max())
    assert float((got.double() - exact).abs().max()) <= 2 * yardstick + 2 * ulp
