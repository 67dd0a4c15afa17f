"""Plans are values: they survive JSON, describe themselves, and refuse what makes no sense."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_longctx as lc

WINDOWS = st.builds(
    lambda sink, window, more: lc.SinkWindow(sink, window, None if more is None else window + more),
    st.integers(0, 9),
    st.integers(1, 99),
    st.none() | st.integers(0, 99),
)


def layer(draw: Any, positions: Any, retentions: Any) -> lc.LayerPlan:
    """A random partition of up to six heads."""
    roles = draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
    groups = [tuple(h for h, role in enumerate(roles) if role == mine) for mine in sorted(set(roles))]
    return lc.LayerPlan(tuple(lc.HeadGroup(g, lc.HeadPolicy(draw(retentions), positions)) for g in groups))


@st.composite
def plans(draw: Any) -> lc.Plan:
    positions = draw(st.sampled_from([lc.Absolute(), lc.InCache()]))
    retentions = WINDOWS if positions.in_cache else WINDOWS | st.just(lc.KeepAll())
    return lc.Plan("drawn", tuple(layer(draw, positions, retentions) for _ in range(draw(st.integers(1, 4)))))


@settings(max_examples=100)
@given(plans())
def test_json_round_trip(plan: lc.Plan) -> None:
    again = lc.Plan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.describe() == plan.describe()


@settings(max_examples=50)
@given(plans())
def test_a_lap_holds_every_window(plan: lc.Plan) -> None:
    if not plan.bounded:
        assert plan.lap is None
        return
    for part in plan.layers:
        for group in part.groups:
            assert group.policy.retention.window <= plan.lap
            assert group.policy.retention.reach(True) <= plan.lap


def test_equal_layers_share_a_line() -> None:
    full = lc.HeadPolicy(lc.KeepAll(), lc.Absolute())
    narrow = lc.HeadPolicy(lc.SinkWindow(4, 16), lc.Absolute())
    split = lc.LayerPlan((lc.HeadGroup((0, 2), full), lc.HeadGroup((1,), narrow)))
    whole = lc.LayerPlan((lc.HeadGroup((0, 1, 2), full),))
    assert lc.Plan("mixed", (split, split, whole)).describe().splitlines() == [
        "mixed: 3 attention layers",
        "  layers 0-1, KV heads 0, 2: keep all, positions of the text",
        "  layers 0-1, KV head 1: keep 4 sinks + window 16, positions of the text",
        "  layer 2, KV heads 0-2: keep all, positions of the text",
    ]


@pytest.mark.parametrize("heads", [[(0, 1), (1,)], [(0,), (2,)], [(0,), ()], []])
def test_groups_must_be_a_partition(heads: list[tuple[int, ...]]) -> None:
    policy = lc.HeadPolicy(lc.KeepAll(), lc.Absolute())
    with pytest.raises(ValueError, match=r"name every KV head 0..Hkv-1 once"):
        lc.LayerPlan(tuple(lc.HeadGroup(mine, policy) for mine in heads))


def test_a_plan_has_layers() -> None:
    with pytest.raises(ValueError, match="expected at least one layer"):
        lc.Plan("empty", ())


STREAM = lc.HeadGroup((0,), lc.HeadPolicy(lc.SinkWindow(4, 16), lc.InCache()))
MISFITS = {
    "keep all": lc.HeadPolicy(lc.KeepAll(), lc.InCache()),
    "keep all, in the text": lc.HeadPolicy(lc.KeepAll(), lc.Absolute()),
    "sinks of the text": lc.HeadPolicy(lc.SinkWindow(4, 16), lc.Absolute()),
}


@pytest.mark.parametrize("policy", list(MISFITS.values()), ids=list(MISFITS))
def test_in_cache_positions_need_windows_and_their_sinks(policy: lc.HeadPolicy) -> None:
    """Keys are rotated at small positions in the whole model then: far sinks of the text are out of reach."""
    message = f"expected a window on every head, .*; got '{re.escape(policy.describe())}'"
    with pytest.raises(ValueError, match="layer 0, KV head 1: " + message):
        lc.Plan("mixed", (lc.LayerPlan((STREAM, lc.HeadGroup((1,), policy))),))
    with pytest.raises(ValueError, match="layer 1, KV head 0: " + message):
        lc.Plan("mixed", (lc.LayerPlan((STREAM,)), lc.LayerPlan((lc.HeadGroup((0,), policy),))))


def test_a_bare_window_fits_anywhere() -> None:
    bare = lc.HeadGroup((1,), lc.HeadPolicy(lc.SinkWindow(0, 8), lc.Absolute()))
    assert lc.Plan("sliding", (lc.LayerPlan((STREAM, bare)),)).bounded


@pytest.mark.parametrize("sizes", [(-1, 4), (0, 0), (4, -3), (4, 2.5), (4, 8, 7), (True, 4)])
def test_sizes_are_whole_and_positive(sizes: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="SinkWindow: expected"):
        lc.SinkWindow(*sizes)


@pytest.mark.parametrize("text", ["", "{}", '{"method": "x"}', '{"method": "x", "layers": [[{"kv_heads": [0]}]]}'])
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(ValueError, match=r"Plan\.from_json: expected the text"):
        lc.Plan.from_json(text)


def test_an_unknown_primitive_is_named() -> None:
    plan = lc.Plan("one", (lc.LayerPlan((lc.HeadGroup((0,), lc.HeadPolicy(lc.KeepAll(), lc.Absolute())),)),))
    with pytest.raises(ValueError, match="got 'KeepNone'"):
        lc.Plan.from_json(plan.to_json().replace("KeepAll", "KeepNone"))


def test_a_primitive_in_the_wrong_place_is_refused() -> None:
    text = lc.Plan("one", (lc.LayerPlan((STREAM,)),)).to_json()
    raw = json.loads(text)
    group = raw["layers"][0][0]
    group["retention"], group["positions"] = group["positions"], group["retention"]
    with pytest.raises(ValueError, match=r"Plan\.from_json: expected the text"):
        lc.Plan.from_json(json.dumps(raw))
