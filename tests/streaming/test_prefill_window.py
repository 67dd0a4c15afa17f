"""`prefill_window`: prompts see the wide window; the first decode call narrows the store."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_longctx as lc
from hf_longctx.testing import feed, oracle_logits, tiny_llama

from . import draws

MODEL = tiny_llama()


def plan_of(sink: int, window: int, wide: int, positions: lc.InCache | lc.Absolute) -> lc.Plan:
    group = lc.HeadGroup((0, 1), lc.HeadPolicy(lc.SinkWindow(sink, window, wide), positions))
    return lc.Plan("wide prefill", (lc.LayerPlan((group,)),) * 2)


@pytest.mark.parametrize("positions", [lc.Absolute(), lc.InCache()], ids=["text", "cache"])
@settings(max_examples=40)
@given(st.data(), st.integers(0, 4), st.integers(1, 8), st.integers(0, 12))
def test_prompt_sees_the_wide_window_and_steps_the_narrow_one(
    positions: lc.InCache | lc.Absolute, data: st.DataObject, sink: int, window: int, more: int
) -> None:
    calls = data.draw(st.lists(st.sampled_from([1, 1, 2, 8, 9, 17]), min_size=1, max_size=10))
    mask = data.draw(draws.padding(sum(calls)))
    ids = draws.tokens(1 if mask is None else len(mask), sum(calls), seed=0)
    plan = plan_of(sink, window, window + more, positions)
    oracle = oracle_logits(MODEL, plan, ids, mask, calls=calls)
    with lc.patched(MODEL, plan):
        got, _ = feed(MODEL, ids, calls, mask)
    draws.assert_equal(MODEL, got, oracle, sink + window + more, mask)


def test_bytes_fall_at_the_first_step() -> None:
    ids = draws.tokens(1, 60, seed=0)
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, KV heads, channels, bytes
    with lc.patched(MODEL, plan_of(2, 5, 30, lc.Absolute())), torch.no_grad():
        cache = MODEL(ids[:, :59], use_cache=True).past_key_values
        assert cache.kv_bytes == (2 + 30) * per_token
        MODEL(ids[:, 59:], past_key_values=cache)
        assert cache.kv_bytes == (2 + 5) * per_token
