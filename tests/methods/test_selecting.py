"""Methods that select: their plans as values, how budgets are counted and knobs refused by name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_longctx as lc
from hf_longctx.evals.results import save_json
from hf_longctx.methods import METHODS
from hf_longctx.models import ModelFacts, inspect_model
from hf_longctx.select.budgets import Mass, TopK
from hf_longctx.select.scorers import Antidiagonal, RepresentativeDot, RepresentativeShare, UpperBound
from hf_longctx.select.summaries import Means, MinMax, Representatives
from hf_longctx.tune.thresholds import Thresholds

from ..integration.cases import BY_NAME, ORIGINAL
from .cases import LIMITS, SELECTING, TOKENS, gates, named, pairs

ALL = pairs((*LIMITS, *SELECTING))


def facts_of(name: str = "llama") -> ModelFacts:
    return inspect_model(BY_NAME[name].make())


FACTS = facts_of()
GATES = [[0.1, 0.9], [0.8, 0.3]]  # KV head 1 of layer 0 and KV head 0 of layer 1 retrieve
TAU = [[0.5, 0.6, 0.7, 0.8], [0.1, 0.2, 0.3, 0.4]]


def policies(plan: lc.Plan) -> list[list[tuple[tuple[int, ...], lc.HeadPolicy]]]:
    return [[(group.kv_heads, group.policy) for group in layer.groups] for layer in plan.layers]


# plans ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("row", "case"), ALL, ids=named)
def test_plans_survive_json_and_keep_the_models_own_windows(row: Any, case: Any) -> None:
    facts = inspect_model(case.make())
    plan = row.method(case).plan(facts)
    again = lc.Plan.from_json(plan.to_json())
    assert (again, again.describe()) == (plan, plan.describe())
    for layer, part in zip(facts.layers, plan.layers, strict=True):
        assert part.kv_heads == layer.kv_heads
        if layer.window is not None:
            (group,) = part.groups
            assert group.policy.retention == lc.SinkWindow(0, layer.window)
            assert (group.policy.prefill, group.policy.decode, group.policy.placement) == (None, None, None)


def test_quest_is_dense_in_its_first_layers() -> None:
    plan = lc.Quest(token_budget=2048, dense_layers=1).plan(FACTS)
    selector = lc.Selector(UpperBound(MinMax(16, 16)), TopK(2016), sink=4)
    dense = lc.HeadPolicy(lc.KeepAll(), lc.Absolute())
    sparse = lc.HeadPolicy(lc.KeepAll(), lc.Absolute(), decode=selector)
    assert policies(plan) == [[((0, 1), dense)], [((0, 1), sparse)]]


def test_xattention_forces_the_first_block_and_the_diagonal() -> None:
    plan = lc.XAttention(stride=8, tau=0.7).plan(FACTS)
    selector = lc.Selector(Antidiagonal(128, 8), Mass(0.7), sink=1, local=1, share="q_head", dense_below=4096)
    assert policies(plan) == [[((0, 1), lc.HeadPolicy(lc.KeepAll(), lc.Absolute(), prefill=selector))]] * 2
    assert selector.sink_blocks == 1


@pytest.mark.parametrize(
    ("share", "shares"),
    [
        ("q_head", [(0.5, 0.6, 0.7, 0.8), (0.1, 0.2, 0.3, 0.4)]),
        ("kv_head", [(0.6, 0.8), (0.2, 0.4)]),
        ("all", [(0.8,), (0.4,)]),
    ],
)
@pytest.mark.parametrize("given_as", ["list", "thresholds", "path"])
def test_xattention_takes_thresholds_per_head(share: Any, shares: Any, given_as: str, tmp_path: Path) -> None:
    found = Thresholds("tiny", "llama", 16, 128, tuple(map(tuple, TAU)))
    save_json(tmp_path / "taus.json", found.to_json())
    tau = {"list": TAU, "thresholds": found, "path": tmp_path / "taus.json"}[given_as]
    plan = lc.XAttention(tau=tau, share=share).plan(FACTS)
    assert [layer.groups[0].policy.prefill.budget for layer in plan.layers] == [Mass(row) for row in shares]


def test_lserve_splits_heads_and_hands_each_head_its_own_threshold() -> None:
    plan = lc.LServe(GATES, stride=16, tau=TAU).plan(FACTS)
    decode = lc.Selector(UpperBound(MinMax(64, 16)), TopK(4032), refresh_every=4)
    streaming = lc.HeadPolicy(lc.SinkWindow(128, 256, 8192), lc.Absolute(), kv=lc.Int8KV())

    def far(*tau: float) -> lc.HeadPolicy:
        prefill = lc.Selector(Antidiagonal(128, 16), Mass(tau), sink=1, share="q_head", dense_below=4096)
        return lc.HeadPolicy(lc.KeepAll(), lc.Absolute(), prefill, decode, lc.Int8KV())

    assert policies(plan) == [
        [((1,), far(0.7, 0.8)), ((0,), streaming)],
        [((0,), far(0.1, 0.2)), ((1,), streaming)],
    ]


def test_inf_llm_uses_one_selector_for_both_phases() -> None:
    plan = lc.InfLLM(init=256, local=200, topk=3, kv="int8", host_ram="1GiB").plan(FACTS)
    scorer = RepresentativeShare(Means(128, 8), 512)
    selector = lc.Selector(scorer, TopK(384), sink=256, local=200, share="all")
    place = lc.HostLRU(32, "1GiB")
    policy = lc.HeadPolicy(lc.KeepAll(), lc.Clamped(199), selector, selector, lc.Int8KV(), place)
    assert policies(plan) == [[((0, 1), policy)]] * 2
    paper = lc.InfLLM(representatives=4, by="attention", share="kv_head").plan(FACTS).layers[0].groups[0].policy.decode
    assert (paper.scorer, paper.share) == (RepresentativeDot(Representatives(128, 4), 512), "kv_head")
    packed = lc.InfLLM(representatives=32, index="int4").plan(FACTS).layers[0].groups[0].policy.prefill
    assert packed is not None
    assert packed.scorer == RepresentativeShare(Means(128, 4, 4), 512)
    on_device = lc.InfLLM(local=200, offload=False).plan(FACTS)
    assert {group.policy.placement for layer in on_device.layers for group in layer.groups} == {None}


@pytest.mark.parametrize(("trained", "local"), [(256, 128), (8192, 4096), (131072, 4096), (4096, 2048), (None, 4096)])
def test_inf_llm_chooses_a_local_window_within_the_trained_length(trained: int | None, local: int) -> None:
    config = SimpleNamespace(**({} if trained is None else {"max_position_embeddings": trained}))
    facts = dataclasses.replace(FACTS, config=config)
    selector = lc.InfLLM().plan(facts).layers[0].groups[0].policy.decode
    assert selector is not None
    assert selector.local == local


def test_inf_llm_stays_where_frequencies_do_not_change() -> None:
    facts = facts_of("llama_longrope")
    assert lc.InfLLM().plan(facts).lap == ORIGINAL
    with pytest.raises(lc.UnsupportedError, match=f"inf_llm: expected local <= {ORIGINAL} for 'llama'"):
        lc.InfLLM(local=ORIGINAL + 1).plan(facts)
    with pytest.raises(lc.UnsupportedError, match="expected local <= 256, on which 'llama' was trained; got 257"):
        lc.InfLLM(local=257).plan(FACTS)


@pytest.mark.parametrize("kv", ["int8", "int4"])
@pytest.mark.parametrize("case", [BY_NAME["llama"], BY_NAME["gemma2"]], ids=named)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_the_knob_kv(name: str, case: Any, kv: str) -> None:
    """It holds for all layers, those with a sliding window of their own too."""
    knobs = {"pattern": gates(case)} if name in ("duo_attention", "lserve") else {}
    plan = METHODS[name](**knobs, kv=kv).plan(inspect_model(case.make()))
    formats = {group.policy.kv for layer in plan.layers for group in layer.groups}
    assert formats == {lc.Int8KV() if kv == "int8" else lc.Int4KV()}


# budgets --------------------------------------------------------------------------------------------------------------


def pages_read(selector: lc.Selector, position: int) -> tuple[int, int]:
    """Pages that a decode step at a position reads, by the literal rule, and pages that there are."""
    page, here = selector.block, position // selector.block
    if position < selector.dense_below:
        return here + 1, here + 1
    oldest = max(0, position - selector.local + 1) // page
    forced = {j for j in range(here + 1) if j < selector.sink_blocks or j >= oldest}
    candidates = [j for j in range(here + 1) if j not in forced]
    assert selector.budget.tokens is not None
    return len(forced) + min(len(candidates), selector.budget.tokens // page), here + 1


@settings(max_examples=200)
@given(page=st.integers(1, 9), sink=st.integers(0, 20), local=st.integers(1, 25), more=st.integers(1, 4))
def test_quest_reads_as_many_pages_as_it_says(page: int, sink: int, local: int, more: int) -> None:
    """Whatever is forced, exactly the budget's pages once there are more, and all of them before."""
    for budget in range(page, 80 * page, page):
        try:
            quest = lc.Quest(budget, page=page, sink=sink, local=local, dense_layers=0)
            break
        except ValueError:
            continue
    quest = lc.Quest(budget + (more - 1) * page, page=page, sink=sink, local=local, dense_layers=0)
    selector = quest.plan(FACTS).layers[0].groups[0].policy.decode
    assert selector is not None
    assert selector.local >= local
    for position in range(3 * quest.token_budget):
        read, there = pages_read(selector, position)
        assert read == min(there, quest.token_budget // page)


def test_lserve_counts_the_last_page() -> None:
    selector = lc.LServe(GATES, token_budget=256).plan(FACTS).layers[0].groups[0].policy.decode
    assert selector is not None
    assert [pages_read(selector, position) for position in (0, 255, 256, 999)] == [(1, 1), (4, 4), (4, 5), (4, 16)]


def test_limit_rows_have_room_for_the_text() -> None:
    """A limit row of Quest or LServe reads every page of the text at its last token."""
    seen = 0
    for row, case in pairs(LIMITS, (BY_NAME["llama"],)):
        for layer in row.method(case).plan(FACTS).layers:
            for group in layer.groups:
                if group.policy.decode is not None and isinstance(group.policy.decode.scorer, UpperBound):
                    read, there = pages_read(group.policy.decode, TOKENS - 1)
                    assert read == there
                    seen += 1
    assert seen >= 8


# refusals -------------------------------------------------------------------------------------------------------------

WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: lc.Quest(token_budget=100), "Quest: expected token_budget as whole pages of 16 tokens, at least 48"),
    (lambda: lc.Quest(token_budget=16), "1 with the last tokens and one to choose; got 16. Give 48"),
    (lambda: lc.Quest(token_budget=64, sink=17, local=2), "at least 80: 2 with sinks, 2 with the last tokens"),
    (lambda: lc.Quest(token_budget=2048.0), "got 2048.0"),  # type: ignore[arg-type]
    (lambda: lc.Quest(page=0), "MinMax: expected block as a whole number >= 1; got 0"),
    (lambda: lc.Quest(dense_layers=True), "Quest: expected dense_layers as a whole number >= 0; got True"),
    (lambda: lc.Quest(local=0), "Selector: expected local"),
    (lambda: lc.Quest(sink=-1), "Selector: expected sink"),
    (lambda: lc.Quest(dense_layers=-1), "Quest: expected dense_layers"),
    (lambda: lc.Quest(share="heads"), "expected share"),  # type: ignore[arg-type]
    (lambda: lc.Quest(kv="int3"), "Quest: expected kv among native, int8, int4; got 'int3'"),
    (lambda: lc.Dense(kv="fp8"), "Dense: expected kv"),
    (lambda: lc.XAttention(stride=7), "stride that divides the block of 128; got 7"),
    (lambda: lc.XAttention(tau=0), "tau in"),
    (lambda: lc.XAttention(tau=1.5), "tau in"),
    (lambda: lc.XAttention(share="head"), "expected share"),  # type: ignore[arg-type]
    (lambda: lc.XAttention(scores="int4"), "expected scores 'native', 'fp8' or 'int8'; got 'int4'"),  # type: ignore[arg-type]
    (lambda: lc.XAttention(dense_below=-1), "Selector: expected dense_below as a whole number >= 0; got -1"),
    (lambda: lc.Quest(dense_below=4096.0), "expected dense_below as a whole number >= 0; got 4096.0"),  # type: ignore[arg-type]
    (lambda: lc.LServe(logical=24), "got block=64, sub=24"),
    (lambda: lc.LServe(token_budget=100), "LServe: expected token_budget as whole pages of 64 tokens, at least 128"),
    (lambda: lc.LServe(prefill_window=255), "expected prefill_window"),
    (lambda: lc.LServe(sparsity=1.1), "expected sparsity"),
    (lambda: lc.LServe(refresh_every=0), "expected refresh_every"),
    (lambda: lc.LServe(stride=5), "stride that divides"),
    (lambda: lc.InfLLM(init=100), "InfLLM: expected init in whole blocks of 128; got 100"),
    (lambda: lc.InfLLM(topk=0), "InfLLM: expected topk as a whole number >= 1; got 0"),
    (lambda: lc.InfLLM(topk=1.5), "InfLLM: expected topk as a whole number >= 1; got 1.5"),  # type: ignore[arg-type]
    (lambda: lc.InfLLM(topk=-1), "InfLLM: expected topk as a whole number >= 1; got -1"),
    (lambda: lc.InfLLM(index="int2"), "InfLLM: expected index among native, int8, int4; got 'int2'"),
    (lambda: lc.InfLLM(by="attention", index="int8"), "InfLLM: expected index 'native' beside by='attention'; got"),
    (lambda: lc.InfLLM(offload=False, host_ram="8GiB"), "InfLLM: expected offload True beside host_ram"),
    (lambda: lc.InfLLM(local=0), "expected local"),
    (lambda: lc.InfLLM(representatives=129, by="attention"), "expected a count between 1 and the block"),
    (lambda: lc.InfLLM(representatives=5), "InfLLM: expected representatives that divide the block of 128; got 5"),
    (lambda: lc.InfLLM(representatives=0), "InfLLM: expected representatives as a whole number >= 1; got 0"),
    (lambda: lc.InfLLM(by="mass"), "InfLLM: expected by as 'place' or 'attention'; got 'mass'"),  # type: ignore[arg-type]
    (lambda: lc.InfLLM(q_block=0), "expected q_block"),
    (lambda: lc.InfLLM(resident_blocks=-1), "expected resident_blocks"),
    (lambda: lc.InfLLM(host_ram="much"), "expected ram"),
    (lambda: lc.DuoHeads(sparsity=-0.1), "DuoHeads: expected sparsity"),
]


@pytest.mark.parametrize(("make", "words"), WRONG, ids=[words[-40:] for _, words in WRONG])
def test_a_knob_that_makes_no_sense_is_refused_when_it_is_set(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make()


def test_kv_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match="Quest: expected kv as a name"):
        lc.Quest(kv=4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tau", "words"),
    [
        ([[0.5] * 4], "expected thresholds for layers 2; got 1"),
        ([[0.5] * 2] * 2, "expected thresholds for query heads 4; got 2"),
        ([[0.5] * 4, [0.5, 0.5, 0.5, 1.01]], r"layer 1, query head 3: expected a threshold in \(0, 1\]; got 1.01"),
        (Thresholds("other", "qwen2", 16, 128, ((0.5,) * 4,) * 2), "for family 'llama'; got 'qwen2'"),
        (Thresholds("other", "llama", 8, 128, ((0.5,) * 4,) * 2), "for stride 16; got 8"),
        (Thresholds("other", "llama", 16, 64, ((0.5,) * 4,) * 2), "for block 128; got 64"),
    ],
)
def test_thresholds_of_something_else_are_refused(tau: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lc.XAttention(tau=tau).plan(FACTS)
