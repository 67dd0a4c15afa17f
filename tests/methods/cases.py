"""Every method, at knobs where it is dense attention, and at knobs where it drops most of a short text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hf_longctx as lc

from ..integration.cases import FAMILIES, LEARNED_POSITIONS, ORIGINAL, ROPE_TYPES
from ..integration.tiny import Case

DECODERS: tuple[Case, ...] = (*FAMILIES, *ROPE_TYPES, *LEARNED_POSITIONS)
TOKENS = 60  # of a text in the limit tests: beyond every sliding window and every original length


@dataclass(frozen=True)
class Row:
    """A method with knobs.

    Args:
        name: unique among the rows of a table.
        method: makes the method for a model.
        in_cache: positions are counted in the cache, which some models do not allow.
        everywhere: it does not need a layer with full attention.
    """

    name: str
    method: Callable[[Case], Any]
    in_cache: bool = False
    everywhere: bool = False

    def takes(self, case: Case) -> bool:
        """Whether `patch` accepts the model."""
        if case.refused is not None:
            return False
        if self.in_cache and case.positions == "learned":
            return False
        return self.everywhere or len(case.sliding) < case.layers

    def tokens(self, case: Case) -> int:
        """Length of a text on which a limit row is dense."""
        return ORIGINAL if self.in_cache and changes_with_length(case) else TOKENS


def changes_with_length(case: Case) -> bool:
    """Whether rotary frequencies change beyond the original length."""
    return case.rope in ("dynamic", "longrope")


def gates(case: Case) -> list[list[float]]:
    """A head pattern for the model, all gates different."""
    heads = case.layers * case.kv_heads
    return [[(7 * (i * case.kv_heads + h) % heads) / heads for h in range(case.kv_heads)] for i in range(case.layers)]


def _duo(sparsity: float, sinks: int, window: int) -> Callable[[Case], lc.DuoAttention]:
    return lambda case: lc.DuoAttention(pattern=gates(case), sparsity=sparsity, sinks=sinks, window=window)


def _stream_limit(case: Case) -> lc.StreamingLLM:
    return lc.StreamingLLM(sinks=4, window=(ORIGINAL if changes_with_length(case) else TOKENS) - 4)


def _inf_limit(case: Case) -> lc.InfLLM:
    local = ORIGINAL if changes_with_length(case) else TOKENS
    return lc.InfLLM(init=8, local=local, block=8, topk=1, representatives=2, q_block=16, resident_blocks=2)


def _lserve(sparsity: float, **knobs: Any) -> Callable[[Case], lc.LServe]:
    return lambda case: lc.LServe(pattern=gates(case), sparsity=sparsity, page=8, logical=4, refresh_every=3, **knobs)


LIMITS: tuple[Row, ...] = (
    Row("dense", lambda case: lc.Dense(), everywhere=True),
    Row("streaming_llm", _stream_limit, in_cache=True),
    Row("duo_attention_all_retrieve", _duo(0.0, sinks=1, window=2)),
    Row("duo_attention_wide_window", _duo(0.5, sinks=4, window=TOKENS - 4)),
    Row("quest_budget", lambda case: lc.Quest(TOKENS, page=4, dense_layers=0)),
    Row("quest_budget_with_forced", lambda case: lc.Quest(TOKENS, page=4, dense_layers=0, sink=6, local=7)),
    Row("quest_budget_per_query_head", lambda case: lc.Quest(TOKENS, page=4, dense_layers=0, share="q_head")),
    Row("quest_all_layers_dense", lambda case: lc.Quest(8, page=4, sink=0, dense_layers=case.layers)),
    Row("xattention_tau_1", lambda case: lc.XAttention(stride=4, tau=1.0, block=8, dense_below=0)),
    Row("xattention_dense_below", lambda case: lc.XAttention(stride=4, tau=0.2, block=8, dense_below=TOKENS)),
    Row("quest_dense_below", lambda case: lc.Quest(8, page=4, sink=0, dense_layers=0, dense_below=TOKENS)),
    Row("lserve_budget", _lserve(0.0, token_budget=TOKENS + 4, kv="native", stride=8, tau=1.0)),
    Row("lserve_wide_window", _lserve(0.5, token_budget=TOKENS + 4, kv="native", sinks=4, window=TOKENS - 4)),
    Row("inf_llm_local", _inf_limit, in_cache=True),
)
"""Equal to the unpatched model; window, budget or local is exactly the length of the text, or the next whole page."""

LOSSY: tuple[Row, ...] = (
    Row("streaming_llm", lambda case: lc.StreamingLLM(sinks=2, window=9), in_cache=True),
    Row("duo_attention", _duo(0.5, sinks=2, window=5)),
)
"""Windows so small that a text of some tens of tokens is mostly dropped, and every ring goes round several times."""

SELECTING: tuple[Row, ...] = (
    Row("quest", lambda case: lc.Quest(8, page=4, sink=0, dense_layers=0)),
    Row("xattention", lambda case: lc.XAttention(stride=4, tau=0.2, block=8, dense_below=0)),
    Row("lserve", _lserve(0.5, token_budget=16, kv="int4", sinks=2, window=5, prefill_window=9)),
    Row(
        "inf_llm",
        lambda case: lc.InfLLM(init=4, local=6, block=4, topk=1, representatives=2, q_block=8, resident_blocks=2),
        in_cache=True,
    ),
    Row(
        "inf_llm_by_attention",
        lambda case: lc.InfLLM(4, 6, 4, 1, 2, "attention", q_block=8, resident_blocks=2),
        in_cache=True,
    ),
)
"""Budgets so small that of some tens of tokens most are not read. What is read depends on where the calls end."""


def pairs(rows: tuple[Row, ...], cases: tuple[Case, ...] = DECODERS) -> list[tuple[Row, Case]]:
    """Each row with each model that it takes."""
    return [(row, case) for row in rows for case in cases if row.takes(case)]


def named(pair: Any) -> str:
    """Test id of a row or a case."""
    return str(getattr(pair, "name", pair))
