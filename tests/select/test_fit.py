"""Plans that select, clamp, quantize and offload: they survive JSON, and each rule of what fits together is named."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_longctx as lc
from hf_longctx.cache.kv_format import Int4KV, Int8KV
from hf_longctx.cache.placement import HostLRU
from hf_longctx.cache.positions import Clamped
from hf_longctx.plan import Selector
from hf_longctx.plan.axes import PRIMITIVES
from hf_longctx.select.budgets import Mass, TopK
from hf_longctx.select.scorers import Antidiagonal, RepresentativeDot, RepresentativeShare, UpperBound
from hf_longctx.select.summaries import Means, MinMax, Representatives

from . import draws

BOUND, DOT, TILES = UpperBound(MinMax(16, 4)), RepresentativeDot(Representatives(16, 2)), Antidiagonal(16, 4)
RUNS = Selector(RepresentativeShare(Means(16, 4), 64), TopK(32))
ABSOLUTE, CLAMPED, IN_CACHE, KEEP_ALL = lc.Absolute(), Clamped(8), lc.InCache(), lc.KeepAll()


def plan(policy: lc.HeadPolicy) -> lc.Plan:
    return lc.Plan("one", (lc.LayerPlan((lc.HeadGroup((0,), policy),)),))


PLANS = st.one_of(
    draws.quest(), draws.xattention(2), draws.inf_llm(), draws.lserve(), draws.combined(), draws.combined_near()
)


@settings(max_examples=200)
@given(PLANS)
def test_plans_survive_json(drawn: lc.Plan) -> None:
    again = lc.Plan.from_json(drawn.to_json())
    assert again == drawn
    assert hash(again) == hash(drawn)
    assert again.describe() == drawn.describe()


def test_every_primitive_survives_json() -> None:
    together = Selector(DOT, TopK(32), sink=3, local=5, share="all", refresh_every=3)
    policies = [
        lc.HeadPolicy(
            KEEP_ALL, ABSOLUTE, Selector(TILES, Mass((0.5,))), Selector(BOUND, TopK(16)), Int8KV(), HostLRU(2)
        ),
        lc.HeadPolicy(KEEP_ALL, CLAMPED, together, together, Int4KV(), HostLRU(2, ram="3GiB", disk="kv.bin")),
        lc.HeadPolicy(lc.SinkWindow(1, 2, 3), IN_CACHE, kv=Int4KV()),
        lc.HeadPolicy(KEEP_ALL, ABSOLUTE, RUNS, RUNS),
        lc.HeadPolicy(lc.ModalityWindow(5, 6, 1.5, 7), lc.Contiguous()),
    ]
    text = ""
    for policy in policies:
        made = plan(policy)
        assert lc.Plan.from_json(made.to_json()) == made
        text += made.to_json()
    assert set(re.findall(r'"kind": "(\w+)"', text)) == set(PRIMITIVES)


def test_plans_without_selectors_are_read_as_they_were_written_before() -> None:
    text = (
        '{"method": "old", "layers": [[{"kv_heads": [0], "retention": {"kind": "KeepAll"}, '
        '"positions": {"kind": "Absolute"}}]]}'
    )
    assert lc.Plan.from_json(text) == replace(plan(lc.HeadPolicy(KEEP_ALL, ABSOLUTE)), method="old")


def test_clamped_positions_are_small() -> None:
    assert plan(lc.HeadPolicy(KEEP_ALL, CLAMPED)).bounded
    assert plan(lc.HeadPolicy(KEEP_ALL, CLAMPED)).lap == 9
    assert plan(lc.HeadPolicy(KEEP_ALL, ABSOLUTE, decode=Selector(BOUND, TopK(16)))).lap is None
    groups = [lc.HeadGroup((0,), lc.HeadPolicy(KEEP_ALL, CLAMPED)), lc.HeadGroup((1,), WINDOWED)]
    assert lc.Plan("two", (lc.LayerPlan(tuple(groups)),)).lap == 16


WINDOWED = lc.HeadPolicy(lc.SinkWindow(4, 16), IN_CACHE)
BOUNDED, DOTTED = Selector(BOUND, TopK(16)), Selector(DOT, TopK(16))
MISFITS: dict[str, tuple[lc.HeadPolicy, str]] = {
    "clamped window": (
        lc.HeadPolicy(lc.SinkWindow(0, 8), CLAMPED),
        "expected heads with clamped positions to keep everything; got 'keep window 8'",
    ),
    "selecting window": (
        lc.HeadPolicy(lc.SinkWindow(4, 16), ABSOLUTE, decode=BOUNDED),
        "expected heads that select blocks to keep everything; got 'keep 4 sinks + window 16'",
    ),
    "prompt window": (
        lc.HeadPolicy(lc.SinkWindow(4, 16), ABSOLUTE, prefill=Selector(TILES, Mass())),
        "expected heads that select blocks to keep everything",
    ),
    "bounds in prefill": (
        lc.HeadPolicy(KEEP_ALL, ABSOLUTE, prefill=BOUNDED),
        "expected a scorer for prefill; got UpperBound, which works in decode",
    ),
    "antidiagonals in decode": (
        lc.HeadPolicy(KEEP_ALL, ABSOLUTE, decode=Selector(TILES, Mass())),
        "expected a scorer for decode; got Antidiagonal, which works in prefill",
    ),
    "clamped bounds": (
        lc.HeadPolicy(KEEP_ALL, CLAMPED, decode=BOUNDED),
        "expected keys at their places in the text for UpperBound; got 'positions of the text, at most 8 apart'",
    ),
    "clamped antidiagonals": (
        lc.HeadPolicy(KEEP_ALL, CLAMPED, prefill=Selector(TILES, Mass())),
        "expected keys at their places in the text for Antidiagonal",
    ),
    "mass of products": (
        lc.HeadPolicy(KEEP_ALL, ABSOLUTE, decode=Selector(BOUND, Mass())),
        "expected a fixed budget for UpperBound, whose scores are no shares of attention; got 90% of attention",
    ),
    "mass of representatives": (
        lc.HeadPolicy(KEEP_ALL, ABSOLUTE, *[Selector(DOT, Mass())] * 2),
        "expected a fixed budget for RepresentativeDot",
    ),
    "half a block": (
        lc.HeadPolicy(KEEP_ALL, ABSOLUTE, decode=Selector(BOUND, TopK(40))),
        "expected a budget in whole blocks of 16 tokens, at least one; got 40. Give 32.",
    ),
    "no block": (
        lc.HeadPolicy(KEEP_ALL, ABSOLUTE, decode=Selector(BOUND, TopK(0))),
        "expected a budget in whole blocks of 16 tokens, at least one; got 0. Give 16.",
    ),
    "two summaries": (
        lc.HeadPolicy(KEEP_ALL, ABSOLUTE, DOTTED, BOUNDED),
        "expected one kind of summary for prefill and decode; got 2 representatives of 16 and bounds of 16 in 4s",
    ),
    "two selectors of representatives": (
        lc.HeadPolicy(KEEP_ALL, ABSOLUTE, DOTTED, replace(DOTTED, local=9)),
        "expected the same selector in prefill and decode for 2 representatives of 16",
    ),
    "representatives in decode only": (
        lc.HeadPolicy(KEEP_ALL, ABSOLUTE, decode=DOTTED),
        "expected the same selector in prefill and decode for 2 representatives of 16",
    ),
    "offloaded without a selector": (
        lc.HeadPolicy(KEEP_ALL, ABSOLUTE, placement=HostLRU()),
        "expected a decode selector with a fixed budget per KV head for 'in host memory but for 32 blocks', "
        "so that a step reads a known number of blocks; got none",
    ),
    "offloaded for each query head": (
        lc.HeadPolicy(KEEP_ALL, ABSOLUTE, decode=replace(BOUNDED, share="q_head"), placement=HostLRU()),
        "expected a decode selector with a fixed budget per KV head for 'in host memory but for 32 blocks', "
        "so that a step reads a known number of blocks; got the best 16 tokens",
    ),
    "clamped beside nothing but text": (
        lc.HeadPolicy(KEEP_ALL, IN_CACHE),
        "expected a window on every head, and its sinks counted in the cache, because some positions are",
    ),
}


@pytest.mark.parametrize(("policy", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_together_is_refused_with_layer_and_head(policy: lc.HeadPolicy, message: str) -> None:
    fine = lc.LayerPlan((lc.HeadGroup((0, 1), lc.HeadPolicy(lc.SinkWindow(0, 8), ABSOLUTE)),))
    groups = (lc.HeadGroup((1,), lc.HeadPolicy(lc.SinkWindow(0, 8), ABSOLUTE)), lc.HeadGroup((0,), policy))
    where = "Plan 'wrong', layer 1, KV head 0: "
    with pytest.raises(ValueError, match="^" + re.escape(where + message)):
        lc.Plan("wrong", (fine, lc.LayerPlan(groups)))


@pytest.mark.parametrize(
    "policy",
    [
        lc.HeadPolicy(KEEP_ALL, ABSOLUTE),
        lc.HeadPolicy(KEEP_ALL, ABSOLUTE, decode=BOUNDED),
        lc.HeadPolicy(lc.SinkWindow(2, 8), ABSOLUTE),
    ],
    ids=["keep all", "selecting", "sinks of the text"],
)
def test_clamped_heads_make_positions_small_for_all(policy: lc.HeadPolicy) -> None:
    clamped = lc.HeadGroup((0,), lc.HeadPolicy(KEEP_ALL, CLAMPED))
    with pytest.raises(ValueError, match="layer 0, KV head 1: expected a window on every head"):
        lc.Plan("mixed", (lc.LayerPlan((clamped, lc.HeadGroup((1,), policy))),))


def test_the_summary_of_a_policy() -> None:
    assert lc.HeadPolicy(KEEP_ALL, ABSOLUTE).summary is None
    assert lc.HeadPolicy(KEEP_ALL, ABSOLUTE, prefill=Selector(TILES, Mass())).summary is None
    assert lc.HeadPolicy(KEEP_ALL, ABSOLUTE, Selector(TILES, Mass()), BOUNDED).summary == MinMax(16, 4)
    assert lc.HeadPolicy(KEEP_ALL, ABSOLUTE, DOTTED, DOTTED).summary == Representatives(16, 2)
