"""XAttention: a prompt's blocks of queries read the blocks of keys that antidiagonal sums say matter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..models import LayerFacts, ModelFacts
from ..plan import KVFormat, Plan, Selector
from ..select.budgets import Mass
from ..select.scorers import Antidiagonal
from ..tune.thresholds import Thresholds, load_thresholds
from .kv import kv_format
from .layouts import DENSE, require_full_attention, uniform


@dataclass(frozen=True)
class XAttention:
    """A prompt reads the blocks that hold a share `tau` of the estimated attention; decode steps are dense.

    Paper: XAttention (arXiv:2503.16428) §2. The first block and the diagonal are always read. Differs: tokens before
    `dense_below` read all, where to choose takes longer than to read; a prompt up to there is read as by `dense`, bit
    for bit. Dense at tau = 1.

    Args:
        stride: tokens of a tile whose antidiagonal is summed; 4 to 16.
        tau: one share for all heads, one per layer and query head `[L][Hq]`, `Thresholds`, or the path of a file that
            `hf-longctx tune xattention` wrote. Heads that share a selection take the largest of theirs.
        block: tokens of a block.
        share: which query heads share a selection: `q_head`, `kv_head` or `all`.
        kv: how keys and values are stored: `native`, `int8` or `int4`.
        dense_below: a block of queries that ends before this position reads everything; `hf-longctx tune crossover`
            measures where that is faster.
        scores: what the estimate is computed of: `native`, queries and keys as they are; or whole numbers (`int8`) or
            floats (`fp8`, e4m3) of 8 bits, with a scale for each tile, in half the time on devices that multiply these.

    Raises:
        ValueError: scores of another kind.
    """

    stride: int = 16
    tau: float | Sequence[Sequence[float]] | str | os.PathLike[str] | Thresholds = 0.9
    block: int = 128
    share: Literal["kv_head", "q_head", "all"] = "q_head"
    kv: str | KVFormat = "native"
    dense_below: int = 4096
    scores: Literal["native", "fp8", "int8"] = "native"

    def __post_init__(self) -> None:
        if self.scores not in ("native", "fp8", "int8"):
            raise ValueError(
                f"XAttention: expected scores 'native', 'fp8' or 'int8'; got {self.scores!r}. 'native' rounds nothing."
            )
        self._selector(Mass(float(self.tau)) if isinstance(self.tau, (int, float)) else Mass())
        kv_format(self.kv, "XAttention")

    def plan(self, facts: ModelFacts) -> Plan:
        """The plan for a model.

        Raises:
            UnsupportedError: every layer has a sliding window.
            ValueError: thresholds of another model, stride or block.
        """
        require_full_attention("xattention", facts)
        dense = replace(DENSE, kv=kv_format(self.kv, "XAttention"))
        return uniform("xattention", facts, [replace(dense, prefill=s) for s in self.selectors(facts)])

    def selectors(self, facts: ModelFacts) -> list[Selector]:
        """What the prompt reads, for each layer."""
        return [self._selector(budget) for budget in self._budgets(facts)]

    def _selector(self, budget: Mass) -> Selector:
        scorer = Antidiagonal(self.block, self.stride, "" if self.scores == "native" else self.scores)
        return Selector(scorer, budget, 1, 1, self.share, dense_below=self.dense_below)

    def _budgets(self, facts: ModelFacts) -> list[Mass]:
        if isinstance(self.tau, (int, float)):
            return [Mass(float(self.tau))] * len(facts.layers)
        found = self.tau
        if isinstance(found, (str, os.PathLike)):
            found = load_thresholds(found)
        if not isinstance(found, Thresholds):
            rows = tuple(tuple(map(float, row)) for row in found)
            found = Thresholds("given", facts.family, self.stride, self.block, rows, source="XAttention, tau")
        found.check(facts.family, len(facts.layers), facts.layers[0].q_heads, self.stride, self.block)
        return [Mass(self._shared(row, layer)) for row, layer in zip(found.tau, facts.layers, strict=True)]

    def _shared(self, row: tuple[float, ...], layer: LayerFacts) -> tuple[float, ...]:
        heads = self._selector(Mass()).choices(layer.kv_heads, layer.q_heads // layer.kv_heads)
        size = layer.q_heads // heads
        return tuple(max(row[i * size : (i + 1) * size]) for i in range(heads))
