"""Quest: each decode step reads the pages whose keys could matter most to its query."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ..models import ModelFacts
from ..plan import KVFormat, Plan, Selector, require_whole
from ..select.summaries import MinMax
from .kv import kv_format
from .layouts import DENSE, require_full_attention, uniform
from .pages import best_pages


@dataclass(frozen=True)
class Quest:
    """A decode step reads `token_budget` tokens in pages, chosen by a bound on their products; prompts are dense.

    Paper: Quest (arXiv:2406.10774) §3. Differs: query heads of a KV head share a selection, so that a page is read
    once (`share="q_head"` selects as the paper), and the page of the first tokens is forced, which heads that share
    would else lose to each other's pages (`sink=0`: as the paper); a budget that covers the text reads all of it.
    Dense where token_budget >= length: what is forced is counted (`pages.py`), so that exactly `token_budget // page`
    pages are read once the text is longer.

    Args:
        token_budget: tokens that a step reads in all, with the last page, the sinks and the local ones; whole pages.
        page: tokens of a page.
        dense_layers: first layers, which read everything.
        share: which query heads share a selection: `kv_head`, `q_head` or `all`.
        sink: first tokens that are always read.
        local: last tokens that are always read; the query's page always is.
        kv: how keys and values are stored: `native`, `int8` or `int4`.
        dense_below: a step at a position before this reads everything; `hf-longctx tune crossover` measures where that
            is faster.
    """

    token_budget: int = 2048
    page: int = 16
    dense_layers: int = 2
    share: Literal["kv_head", "q_head", "all"] = "kv_head"
    sink: int = 4
    local: int = 1
    kv: str | KVFormat = "native"
    dense_below: int = 0

    def __post_init__(self) -> None:
        self._selector  # noqa: B018 - a knob that makes no sense is refused here
        kv_format(self.kv, "Quest")
        require_whole("Quest", 0, dense_layers=self.dense_layers)

    @property
    def _selector(self) -> Selector:
        summary = MinMax(self.page, self.page)
        chosen = best_pages("Quest", self.token_budget, summary, self.sink, self.local, self.share, 1)
        return replace(chosen, dense_below=self.dense_below)

    def plan(self, facts: ModelFacts) -> Plan:
        """The plan for a model.

        Raises:
            UnsupportedError: every layer has a sliding window.
        """
        require_full_attention("quest", facts)
        dense = replace(DENSE, kv=kv_format(self.kv, "Quest"))
        sparse = replace(dense, decode=self._selector)
        return uniform("quest", facts, [dense if i < self.dense_layers else sparse for i in range(len(facts.layers))])
