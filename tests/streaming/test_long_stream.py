"""Ten million tokens in, logits are as exact as at the start; float32 angles of positions in the text are not."""

from __future__ import annotations

import pytest
import torch

import hf_longctx as lc
from hf_longctx.models import inspect_model
from hf_longctx.testing import oracle_logits, rounding, tiny_llama

from . import draws

FAR = 10_000_000
SINKS, WINDOW = 4, 16
PLAN = lc.StreamingLLM(sinks=SINKS, window=WINDOW)


@torch.no_grad()
def stream(model: torch.nn.Module, ids: torch.Tensor, calls: list[int], far: int, forget: bool) -> torch.Tensor:
    """Logits of a stream whose sinks came first and whose other tokens come `far` tokens later."""
    with lc.patched(model, PLAN):  # type: ignore[type-var]
        first = model(ids[:, :SINKS], use_cache=True)
        cache, out, start = first.past_key_values, [first.logits], SINKS
        cache.ledger.columns += far  # the tokens between are gone in any case: only their number matters
        if forget:
            cache.evict(room=WINDOW)  # what the window holds now was never fed
        for size in calls:
            got = model(ids[:, start : start + size], past_key_values=cache)
            out.append(got.logits)
            start += size
    return torch.cat(out, 1)


@pytest.mark.parametrize("calls", [[56], [1] * 56, [1, 3, 20, 1, 1, 30]], ids=["prompt", "steps", "chunks"])
def test_far_into_the_stream_logits_agree_as_at_its_start(calls: list[int]) -> None:
    model, ids = tiny_llama(), draws.tokens(1, SINKS + 56, seed=0)
    plan = PLAN.plan(inspect_model(model))
    oracle = oracle_logits(model, plan, ids)
    for far in (0, FAR, FAR + 7, 10 * FAR):
        draws.assert_equal(model, stream(model, ids, calls, far, forget=True), oracle, SINKS + WINDOW)


def test_without_forgetting_they_agree_once_the_window_is_fresh() -> None:
    """Tokens that see nothing but fresh ones: two layers reach back two windows."""
    model, ids = tiny_llama(), draws.tokens(1, SINKS + 4 * WINDOW, seed=1)
    oracle = oracle_logits(model, PLAN.plan(inspect_model(model)), ids)
    fresh = slice(SINKS + 2 * WINDOW, None)
    for calls in ([4 * WINDOW], [1] * (4 * WINDOW)):
        got = stream(model, ids, calls, FAR, forget=False)
        draws.assert_equal(model, got[:, fresh], oracle[:, fresh], SINKS + WINDOW)


@torch.no_grad()
def test_float32_angles_of_positions_in_the_text_would_not_agree() -> None:
    """Rotary attention knows differences only, so moving the whole text must not change the stock model. It does."""
    model, ids = tiny_llama(), draws.tokens(1, SINKS + WINDOW, seed=2)
    here = torch.arange(SINKS + WINDOW)[None]
    near, far = (model(ids, position_ids=here + start, use_cache=False).logits for start in (0, FAR))
    error = float((near - far).abs().max() / near.abs().max())
    assert error > 100 * rounding(model, SINKS + WINDOW)
