"""Shares of attention that are neither one nor one for each choice are refused before anything is changed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

import hf_longctx as lc
from hf_longctx.methods import compose
from hf_longctx.plan import Selector
from hf_longctx.select.budgets import Mass
from hf_longctx.select.scorers import Antidiagonal

from ..integration.cases import BY_NAME
from ..integration.snapshot import differences, snapshot
from .cases import gates
from .test_selecting import FACTS

LLAMA = BY_NAME["llama"]
DENSE = lc.HeadPolicy(lc.KeepAll(), lc.Absolute())


def plan(share: str, number: int, apart: bool = False) -> lc.Plan:
    """Layer 1 chooses by so many shares, KV head 1 alone if apart."""
    budget = Mass(tuple(0.5 for _ in range(number)))
    policy = replace(DENSE, prefill=Selector(Antidiagonal(8, 4), budget, 1, 1, share))  # type: ignore[arg-type]
    groups = (lc.HeadGroup((0,), DENSE), lc.HeadGroup((1,), policy)) if apart else (lc.HeadGroup((0, 1), policy),)
    return lc.Plan("mine", (lc.LayerPlan((lc.HeadGroup((0, 1), DENSE),)), lc.LayerPlan(groups)))


WRONG = [
    ("q_head", 3, False, ", or one for each of 4 query heads; got 3."),
    ("q_head", 2, False, ", or one for each of 4 query heads; got 2."),
    ("q_head", 5, False, ", or one for each of 4 query heads; got 5."),
    ("q_head", 4, True, ", or one for each of 2 query heads; got 4."),
    ("kv_head", 4, False, ", or one for each of 2 KV heads; got 4."),
    ("all", 2, False, "; got 2."),
]


@pytest.mark.parametrize(("share", "number", "apart", "words"), WRONG)
def test_a_wrong_number_of_shares_is_refused_by_patch(share: str, number: int, apart: bool, words: str) -> None:
    model = LLAMA.make()
    before = snapshot(model)
    said = f"patch: plan 'mine', layer 1, prefill: expected one tau{words}"
    with pytest.raises(ValueError, match=re.escape(said)):
        lc.patch(model, plan(share, number, apart))
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize(("number", "heads"), [(3, None), (5, lc.DuoHeads(gates(LLAMA)))], ids=["few", "many_split"])
def test_and_by_compose_before_heads_are_divided(number: int, heads: lc.DuoHeads | None) -> None:
    with pytest.raises(ValueError, match=r"compose: plan 'mine', layer 1, prefill: expected one tau, or one for each"):
        compose(FACTS, plan("q_head", number), heads=heads, kv="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("share", "number", "apart"),
    [("q_head", 1, False), ("q_head", 4, False), ("q_head", 2, True), ("kv_head", 2, False), ("all", 1, False)],
)
def test_the_right_number_is_taken(share: str, number: int, apart: bool) -> None:
    model = lc.patch(LLAMA.make(), plan(share, number, apart))
    model(LLAMA.prompt(40))
    assert 0 < (lc.report(model).density or 0) < 1
