"""LServe: half of the heads stream, the others read few pages of a quantized cache, chosen every few steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..cache.positions import Absolute
from ..cache.retention import SinkWindow
from ..models import ModelFacts
from ..plan import HeadPolicy, KVFormat, Plan, Selector
from ..select.summaries import MinMax
from ..tune.thresholds import Thresholds
from .duo_heads import DuoHeads, Pattern
from .kv import kv_format
from .layouts import DENSE, require_full_attention, split
from .pages import best_pages
from .xattention import XAttention


@dataclass(frozen=True)
class LServe:
    """Streaming heads keep sinks and a window; a decode step reads `token_budget` tokens of the retrieval heads.

    Paper: LServe (arXiv:2502.14866) §3. Differs: query heads of a KV head share a selection; the last page is each
    row's own; weights are another matter. Dense at sparsity 0, token_budget >= length, kv native and no stride (tau 1).

    Args:
        pattern: as in `DuoHeads`, like the next.
        sparsity: share of the KV heads that stream, 0 to 1; the lowest gates stream.
        token_budget: tokens that a decode step reads of a retrieval head, with the last page; whole pages.
        kv: how keys and values are stored: `native`, `int8` or `int4`. The paper has 4 bits, for a model whose keys
            were smoothed (QoQ); of a model as it comes, 8 bits lose nothing that a pass key shows, 4 bits lose some.
        sinks: first tokens that streaming heads keep.
        window: last tokens that streaming heads keep.
        prefill_window: last tokens that streaming heads see within a prompt.
        page: tokens of a page.
        logical: tokens behind one pair of bounds; divides the page.
        refresh_every: decode steps from one choice of pages to the next.
        stride: retrieval heads read a prompt as `XAttention` of this stride does; None: densely.
        tau: as in `XAttention`.
    """

    pattern: Pattern | None = None
    sparsity: float = 0.5
    token_budget: int = 4096
    kv: str | KVFormat = "int8"
    sinks: int = 128
    window: int = 256
    prefill_window: int = 8192
    page: int = 64
    logical: int = 16
    refresh_every: int = 4
    stride: int | None = None
    tau: float | Sequence[Sequence[float]] | str | os.PathLike[str] | Thresholds = 0.9

    def __post_init__(self) -> None:
        self._parts()

    def _parts(self) -> tuple[DuoHeads, HeadPolicy, Selector, XAttention | None]:
        """Heads, streaming policy, decode selector and prefill; refuses knobs that make no sense."""
        streaming = HeadPolicy(
            SinkWindow(self.sinks, self.window, self.prefill_window), Absolute(), kv=kv_format(self.kv, "LServe")
        )
        summary = MinMax(self.page, self.logical)
        decode = best_pages("LServe", self.token_budget, summary, 0, 1, "kv_head", self.refresh_every)
        prefill = None if self.stride is None else XAttention(self.stride, self.tau)
        return DuoHeads(self.pattern, self.sparsity), streaming, decode, prefill

    def plan(self, facts: ModelFacts) -> Plan:
        """The plan for a model; errors as `DuoAttention` and `XAttention`."""
        require_full_attention("lserve", facts)
        heads, streaming, decode, prefill = self._parts()
        retrieval, _ = heads.find(facts, "lserve")
        full = replace(DENSE, decode=decode, kv=streaming.kv)
        chosen = [None] * len(facts.layers) if prefill is None else prefill.selectors(facts)
        return split("lserve", facts, retrieval, [replace(full, prefill=s) for s in chosen], streaming)
