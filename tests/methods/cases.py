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


LIMITS: tuple[Row, ...] = (
    Row("dense", lambda case: lc.Dense(), everywhere=True),
    Row("streaming_llm", _stream_limit, in_cache=True),
    Row("duo_attention_all_retrieve", _duo(0.0, sinks=1, window=2)),
    Row("duo_attention_wide_window", _duo(0.5, sinks=4, window=TOKENS - 4)),
)
"""Equal to the unpatched model; sinks + window is exactly the length of the text."""

LOSSY: tuple[Row, ...] = (
    Row("streaming_llm", lambda case: lc.StreamingLLM(sinks=2, window=9), in_cache=True),
    Row("duo_attention", _duo(0.5, sinks=2, window=5)),
)
"""Windows so small that a text of some tens of tokens is mostly dropped, and every ring goes round several times."""


def pairs(rows: tuple[Row, ...], cases: tuple[Case, ...] = DECODERS) -> list[tuple[Row, Case]]:
    """Each row with each model that it takes."""
    return [(row, case) for row in rows for case in cases if row.takes(case)]


def named(pair: Any) -> str:
    """Test id of a row or a case."""
    return str(getattr(pair, "name", pair))
