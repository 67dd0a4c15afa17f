"""Every family of plans that selects, clamps or quantizes against the oracle, in float64: the same blocks, exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_longctx as lc
from hf_longctx.cache.positions import Clamped
from hf_longctx.plan import Selector
from hf_longctx.select.budgets import TopK
from hf_longctx.select.scorers import RepresentativeDot
from hf_longctx.select.summaries import Representatives
from hf_longctx.testing import Widened, feed, oracle_logits

from . import draws

GROUPS = st.sampled_from(sorted(draws.MODELS))
ALLOWED = 1e-9
"""Relative; in float64 a path of some thousand terms adds up to 1e-12, one block too many is above 1e-4."""


def compare(plan: lc.Plan, text: draws.Text, per_kv: int) -> None:
    ids, mask, calls = text
    model = draws.MODELS[per_kv]
    oracle = oracle_logits(model, plan, ids, mask, calls=calls)
    with lc.patched(model, plan), Widened(oracle.dtype):
        got, _ = feed(model, ids, calls, mask)
    real = slice(None) if mask is None else mask.bool()
    error = float((got - oracle)[real].abs().max() / oracle[real].abs().max())
    assert got.dtype == oracle.dtype
    assert error <= ALLOWED, f"relative error {error:.2e}"


@settings(max_examples=20)
@given(draws.quest(), draws.texts(), GROUPS)
def test_upper_bounds_in_decode(plan: lc.Plan, text: draws.Text, per_kv: int) -> None:
    compare(plan, text, per_kv)


@settings(max_examples=20)
@given(st.data(), draws.texts(), GROUPS)
def test_antidiagonals_in_prefill(data: st.DataObject, text: draws.Text, per_kv: int) -> None:
    compare(data.draw(draws.xattention(per_kv)), text, per_kv)


@settings(max_examples=20)
@given(draws.inf_llm(), draws.texts(), GROUPS)
def test_representatives_and_clamped_positions(plan: lc.Plan, text: draws.Text, per_kv: int) -> None:
    compare(plan, text, per_kv)


@pytest.mark.parametrize("calls", [[1] * 10, [4, 4, 1, 1], [9, 1]])
def test_blocks_may_close_before_the_first_key_is_far(calls: list[int]) -> None:
    reads = Selector(RepresentativeDot(Representatives(4, 1), 4), TopK(4), 0, 1)
    policy = lc.HeadPolicy(lc.KeepAll(), Clamped(8), reads, reads)
    compare(
        draws.plan((policy,), (policy,)), (torch.tensor([[44, 94, 121, 13, 31, 116, 71, 84, 105, 14]]), None, calls), 1
    )


@settings(max_examples=20)
@given(draws.lserve(), draws.texts(), GROUPS)
def test_two_groups_of_heads_in_few_bits(plan: lc.Plan, text: draws.Text, per_kv: int) -> None:
    compare(plan, text, per_kv)


@settings(max_examples=25)
@given(draws.combined() | draws.combined_near(), draws.texts(), GROUPS)
def test_all_of_it_at_once(plan: lc.Plan, text: draws.Text, per_kv: int) -> None:
    compare(plan, text, per_kv)


@settings(max_examples=10)
@given(draws.FORMATS, draws.texts(), GROUPS, st.sampled_from(["text", "cache", "clamped"]))
def test_few_bits_without_a_selector(kv: object, text: draws.Text, per_kv: int, kind: str) -> None:
    """The error of a key depends on the angle that it is stored at."""
    policy = {
        "text": draws.DENSE,
        "cache": lc.HeadPolicy(lc.SinkWindow(2, 7), lc.InCache()),
        "clamped": lc.HeadPolicy(lc.KeepAll(), Clamped(5)),
    }[kind]
    compare(draws.plan(*[(replace(policy, kv=kv),)] * 2), text, per_kv)


PROMPT_AND_STEPS = [24, *[1] * 16, 12, *[1] * 8]


@pytest.mark.parametrize("change", ["sink", "local", "tokens", "refresh_every", "share"])
def test_the_oracle_tells_neighbouring_knobs_apart(change: str) -> None:
    selector = Selector(
        draws.UpperBound(draws.MinMax(4, 2)), draws.TopK(8), sink=4, local=4, share="kv_head", refresh_every=2
    )
    other = {
        "sink": replace(selector, sink=5),
        "local": replace(selector, local=8),
        "tokens": replace(selector, budget=draws.TopK(12)),
        "refresh_every": replace(selector, refresh_every=1),
        "share": replace(selector, share="q_head"),
    }[change]
    plans = [draws.plan(*[(replace(draws.DENSE, decode=s),)] * 2) for s in (selector, other)]
    ids = draws.tokens(1, sum(PROMPT_AND_STEPS))
    compare(plans[0], (ids, None, PROMPT_AND_STEPS), 4)
    one, two = (oracle_logits(draws.MODELS[4], p, ids, calls=PROMPT_AND_STEPS) for p in plans)
    assert float((one - two).abs().max() / one.abs().max()) > 1e-4
