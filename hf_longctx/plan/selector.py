"""Which blocks are read: a scorer, a budget, and the blocks that are read in any case."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from .axes import Budget, Scorer, primitive
from .whole import require_whole


@primitive
@dataclass(frozen=True)
class Selector:
    """Which blocks of keys are read: forced ones, and the best-scored of the others.

    For a block of queries whose first token stands at position `p` and whose last at `q`, blocks that hold a position
    below `sink`, or one from `p - local + 1` to `q`, are forced; the scorer ranks the blocks between.

    Args:
        scorer: how much a block matters.
        budget: how many of the scored blocks are read.
        sink: first tokens of each row that are always read.
        local: last tokens that are always read, the query included; the query's own block always is.
        share: which query heads share a selection: those of a KV head, none, or all of the group.
        refresh_every: decode steps from one selection to the next; forced blocks are up to date at every step.
        dense_below: a block of queries that ends before this position reads everything.
    """

    scorer: Scorer
    budget: Budget
    sink: int = 0
    local: int = 1
    share: Literal["kv_head", "q_head", "all"] = "kv_head"
    refresh_every: int = 1
    dense_below: int = 0

    def __post_init__(self) -> None:
        require_whole("Selector", 0, sink=self.sink, dense_below=self.dense_below)
        require_whole("Selector", local=self.local, refresh_every=self.refresh_every)
        if self.share not in ("kv_head", "q_head", "all"):
            raise ValueError(
                f"Selector: expected share 'kv_head', 'q_head' or 'all'; got {self.share!r}. 'kv_head' reads least."
            )

    @property
    def block(self) -> int:
        """Tokens of a block of keys."""
        return self.scorer.block

    @property
    def sink_blocks(self) -> int:
        """Blocks that hold a sink."""
        return -(-self.sink // self.block)

    @cached_property
    def beyond(self) -> Selector:
        """The same for calls that begin beyond `dense_below`: no room is kept for all that lies before."""
        return replace(self, dense_below=0)

    def choices(self, kv_heads: int, per_kv: int) -> int:
        """How many choices so many KV heads make, each of `per_kv` query heads."""
        return {"q_head": kv_heads * per_kv, "kv_head": kv_heads, "all": 1}[self.share]

    def describe(self) -> str:
        """One phrase for a table."""
        forced = [f"{n} {word}" for n, word in ((self.sink, "sinks"), (self.local, "local")) if n > 1]
        shared = {"kv_head": "", "q_head": ", each query head for itself", "all": ", one choice for all heads"}
        again = f", chosen every {self.refresh_every} steps" if self.refresh_every > 1 else ""
        from_there = f", all before {self.dense_below}" if self.dense_below else ""
        beside = f" beside {' + '.join(forced)}" if forced else ""
        return f"{self.budget.describe()} by {self.scorer.describe()}{beside}{shared[self.share]}{again}{from_there}"
