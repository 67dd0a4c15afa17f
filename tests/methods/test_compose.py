"""Several methods and values of axes in one plan: what `compose` makes of them, and what it refuses by name."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

import hf_longctx as lc
from hf_longctx.methods import Method, compose
from hf_longctx.select.budgets import Mass, TopK
from hf_longctx.select.scorers import Antidiagonal, UpperBound
from hf_longctx.select.summaries import MinMax

from ..integration.cases import BY_NAME, ORIGINAL
from .cases import gates
from .test_selecting import FACTS, GATES, TAU, facts_of, policies


def test_all_axes_at_once() -> None:
    quest = lc.Quest(token_budget=4096, dense_layers=1)
    plan = compose(FACTS, lc.XAttention(tau=TAU), quest, lc.DuoHeads(GATES), "int4", lc.HostLRU(8))
    assert plan.method == "xattention + quest + duo_heads + int4 + host_lru"
    near = lc.HeadPolicy(lc.SinkWindow(128, 256), lc.Absolute(), kv=lc.Int4KV())
    decode = lc.Selector(UpperBound(MinMax()), TopK(4064), sink=4)

    def far(*tau: float) -> lc.HeadPolicy:
        prefill = lc.Selector(Antidiagonal(), Mass(tau), sink=1, share="q_head", dense_below=4096)
        return lc.HeadPolicy(lc.KeepAll(), lc.Absolute(), prefill, kv=lc.Int4KV())

    on_host = lc.HeadPolicy(
        lc.KeepAll(), lc.Absolute(), far(0.1, 0.2).prefill, decode, lc.Int4KV(), lc.HostLRU(8)
    )  # layer 1 selects in decode steps
    assert policies(plan) == [[((1,), far(0.7, 0.8)), ((0,), near)], [((0,), on_host), ((1,), near)]]
    assert lc.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", ["gemma2", "qwen2_sliding", "llama_multi_query", "llama_multi_head", "falcon_new"])
def test_composed_plans_fit_the_model(name: str) -> None:
    facts = facts_of(name)
    heads = lc.DuoHeads(gates(BY_NAME[name]), sinks=2, window=5)
    plan = compose(facts, lc.XAttention(), lc.Quest(dense_layers=0), heads, kv="int8")
    for layer, part in zip(facts.layers, plan.layers, strict=True):
        assert part.kv_heads == layer.kv_heads
        assert {group.policy.kv for group in part.groups} == {lc.Int8KV()}
        if layer.window is not None:
            assert [group.policy.retention for group in part.groups] == [lc.SinkWindow(0, layer.window)]


@pytest.mark.parametrize("method", [lc.Quest(dense_layers=0), lc.LServe(GATES, stride=16), lc.InfLLM(), lc.Dense()])
def test_one_method_alone_is_itself(method: Method) -> None:
    plan = method.plan(FACTS)
    assert compose(FACTS, prefill=method) == compose(FACTS, decode=method) == compose(FACTS, decode=plan) == plan


def test_xattention_before_lserve_reads_prompts_in_heads_that_retrieve() -> None:
    plan = compose(FACTS, lc.XAttention(tau=TAU), lc.LServe(GATES))
    expected = lc.LServe(GATES, stride=16, tau=TAU).plan(FACTS)
    assert list(map(dict, policies(plan))) == list(map(dict, policies(expected)))
    assert plan.method == "xattention + lserve"


def test_memory_only_in_heads_that_retrieve() -> None:
    """Beside clamped positions, streaming heads count theirs in the cache: sinks of the text are out of reach."""
    plan = compose(FACTS, decode=lc.InfLLM(), heads=lc.DuoHeads(GATES, sinks=4, window=32))
    (_, far), (_, near) = policies(plan)[0]
    assert near == lc.HeadPolicy(lc.SinkWindow(4, 32), lc.InCache())
    assert far == lc.InfLLM().plan(FACTS).layers[0].groups[0].policy
    with pytest.raises(lc.UnsupportedError, match=f"expected sinks \\+ local <= {ORIGINAL} .* got 4 \\+ 32"):
        compose(facts_of("llama_longrope"), decode=lc.InfLLM(), heads=lc.DuoHeads(GATES, sinks=4, window=8))


def test_blocks_elsewhere_are_chosen_from_the_first_step_on() -> None:
    quest = lc.Quest(dense_layers=0, dense_below=8192)
    there = compose(FACTS, decode=quest, placement=lc.HostLRU())
    assert policies(there) == policies(compose(FACTS, decode=lc.Quest(dense_layers=0), placement=lc.HostLRU()))
    assert quest.plan(FACTS).layers[0].groups[0].policy.decode.dense_below == 8192
    policy = quest.plan(FACTS).layers[0].groups[0].policy
    with pytest.raises(ValueError, match="layer 0, KV head 0: expected dense_below=0 for 'in host memory but for 32"):
        lc.Plan("mine", (lc.LayerPlan((lc.HeadGroup((0,), replace(policy, placement=lc.HostLRU())),)),))


def test_kv_given_apart_wins() -> None:
    plan = compose(FACTS, lc.Dense("int4"), lc.LServe(GATES), kv="native")
    assert {group.policy.kv for layer in plan.layers for group in layer.groups} == {None}
    assert plan.method == "dense + lserve"
    assert compose(FACTS, kv="int8").method == "int8"


OTHER = lc.Quest().plan(facts_of("llama_multi_query"))
UNFIT: list[tuple[dict[str, Any], str]] = [
    ({}, "compose: expected a method or a value of an axis; got none"),
    ({"decode": OTHER}, "compose: expected a plan for 2 layers with 2 KV heads in layer 0; got plan 'quest' with 3"),
    ({"kv": "int2"}, "compose: expected kv among native, int8, int4; got 'int2'"),
    ({"placement": lc.HostLRU()}, "compose 'host_lru': expected a method that selects in decode steps"),
    ({"prefill": lc.XAttention(), "placement": lc.HostLRU()}, "compose 'xattention + host_lru': expected a method"),
    (
        {"decode": lc.Quest(dense_layers=0, share="q_head"), "placement": lc.HostLRU()},
        "Plan 'quest + host_lru', layer 0, KV heads 0-1: expected a decode selector with a fixed budget per KV head",
    ),
    ({"decode": lc.XAttention(), "prefill": lc.InfLLM()}, "'inf_llm + xattention', layer 0, KV heads 0-1: expected"),
    ({"prefill": lc.XAttention(), "decode": lc.InfLLM()}, "expected keys at their places in the text for Antidiagonal"),
    ({"prefill": lc.Quest(), "decode": lc.InfLLM()}, "expected the same selector in prefill and decode"),
    (
        {"prefill": lc.StreamingLLM(), "decode": lc.Quest(dense_layers=0)},
        "Plan 'streaming_llm + quest', layer 0, KV heads 0-1: expected heads that select blocks to keep everything",
    ),
    ({"prefill": lc.InfLLM(), "decode": lc.LServe(GATES)}, "layer 0: expected one way to keep tokens"),
    ({"prefill": lc.Dense("int4"), "decode": lc.LServe(GATES)}, "layer 0: expected one KV format"),
    ({"decode": lc.LServe(GATES), "heads": lc.DuoHeads(GATES)}, "expected methods that leave heads= to choose"),
]


@pytest.mark.parametrize(("values", "words"), UNFIT, ids=[words[-40:] for _, words in UNFIT])
def test_what_does_not_fit_is_refused_by_name(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        compose(FACTS, **values)


def test_heads_of_a_model_with_windows_everywhere_are_refused() -> None:
    with pytest.raises(lc.UnsupportedError, match="sliding window of 16 in all 2 layers"):
        compose(facts_of("mistral_sliding"), heads=lc.DuoHeads(GATES), kv="int8")
