"""What was recorded of one cache's calls of one token: inputs in memory of their own, and the graphs that read them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .cache.cache import LongContextCache
from .cache.kept import Kept
from .cache.recent import RecentStore
from .cache.rows import GROWTH
from .cache.step import FEW, Step
from .cache.store import Store
from .limits import turning_points
from .plan import Plan

ROOM = 512
"""Columns by which there is room for recorded calls at least: to record again costs as much as some eager steps."""

MOST = 4
"""Recorded calls of a cache at a time: with and without a new choice of blocks, with and without a mask."""


MOST_ROUNDS = 2
"""Recorded calls of several tokens: rounds of a stream have two lengths or so, as an answer ended by itself or not."""

MOST_TOKENS = 1024
"""Of a round: longer ones are not bound by launches."""

ROUND_DTYPES = {torch.bfloat16, torch.float16}
"""Of rounds that are recorded: those of the kernel that takes the places of queries from the device."""

SEEN = 2
"""Calls of one length that come before it is recorded: of those that come once it would cost more than it saves."""


def room_after(end: int) -> int:
    """Columns for which there is room once calls that are recorded come to `end`."""
    return -(-(end + end // GROWTH) // ROOM) * ROOM


class Graph(Protocol):
    """A recorded call; made of the call, its device, and what the graphs of a cache share."""

    nbytes: int

    def __init__(self, run: Callable[[], Any], device: torch.device, pool: list[Any]) -> None: ...

    @staticmethod
    def first(run: Callable[[], Any], device: torch.device) -> Any:
        """Run a call that may be recorded later."""

    def replay(self) -> Any:
        """What the call returned, computed on its inputs as they are now; the same memory every time."""


@dataclass(eq=False)
class Take:
    """One kind of call: its inputs, in memory of their own, and the graph that reads them there.

    Args:
        inputs: tensors among the call's arguments.
        lengths: `[B]`, int64, as in `Step`.
        real: `[B, 1]`, bool, likewise, or None.
    """

    inputs: dict[str, Tensor]
    lengths: Tensor
    real: Tensor | None
    graph: Graph | None = None
    used: list[weakref.ref[Any]] = field(default_factory=list)
    ran: int = 0

    @staticmethod
    def of(inputs: Mapping[str, Tensor], step: Step, rows: int) -> Take:
        """Inputs as those of a call."""
        real = None if step.real is None else step.real.clone()
        return Take({name: x.clone() for name, x in inputs.items()}, step.lengths.expand(rows).clone(), real)

    def load(self, inputs: Mapping[str, Tensor], step: Step) -> None:
        """Take over the inputs of a call."""
        for name, x in inputs.items():
            self.inputs[name].copy_(x)
        self.lengths.copy_(step.lengths)
        if self.real is not None and step.real is not None:
            self.real.copy_(step.real)

    def fits(self, buffers: list[Any]) -> bool:
        """True if the graph still finds everything where it was."""
        same = len(self.used) == len(buffers) and all(a() is b for a, b in zip(self.used, buffers, strict=True))
        return self.graph is not None and same


@dataclass(eq=False)
class Recording:
    """What was recorded on one cache, for lengths of its text from `low + 1` to `room`.

    Args:
        low, room: no group of heads changes what it does in between, and so much is reserved.
        stores: of the first layer, to know them again.
        chosen: each choice of blocks that is kept for some steps, and for how many.
        rings: stores that overwrite.
    """

    low: float
    room: int
    stores: list[Any]
    chosen: list[tuple[Kept, int]]
    rings: list[Store]
    takes: dict[Any, Take] = field(default_factory=dict)
    rounds: dict[Any, Take] = field(default_factory=dict)
    pool: list[Any] = field(default_factory=list)

    @staticmethod
    def of(cache: LongContextCache, plan: Plan, end: int) -> Recording:
        """An empty one for a call that ends at `end`, and for as many more as may be."""
        points = turning_points(plan)
        grown = cache.asked if cache.asked >= end else room_after(end)
        room = int(min([grown, *(p for p in points if p >= end)]))
        both = [(group.policy.decode, store) for layer in cache.stacks for group, store in layer.stores]
        chosen = [(s.kept, d.refresh_every) for d, s in both if d is not None and d.refresh_every > 1]
        own = [s.near if isinstance(s, RecentStore) else s for _, s in both if isinstance(s, Store)]
        rings = [s for s in own if s.retention.window is not None]
        return Recording(max((p for p in points if p < end), default=0), room, cache.stacks[0].stores, chosen, rings)

    def covers(self, cache: LongContextCache, end: int) -> bool:
        """True for a call of the same cache that ends at `end`."""
        return self.low < end <= self.room and self.stores is cache.stacks[0].stores

    def due(self, columns: int) -> tuple[bool, ...]:
        """Which choices a call after `columns` columns makes anew."""
        return tuple(kept.is_due(every, columns) for kept, every in self.chosen)

    def take(self, key: Any, inputs: Mapping[str, Tensor], step: Step, rows: int) -> Take:
        """The take of a kind of call, with its inputs loaded; the oldest makes room for a new one."""
        takes, most = (self.takes, MOST) if step.tokens == 1 else (self.rounds, MOST_ROUNDS)
        if key not in takes:
            while len(takes) >= most:
                del takes[next(iter(takes))]
            takes[key] = Take.of(inputs, step, rows)
        takes[key].load(inputs, step)
        return takes[key]

    @property
    def graphs(self) -> list[Graph]:
        """What is recorded now."""
        return [take.graph for take in (*self.takes.values(), *self.rounds.values()) if take.graph is not None]

    def let_go(self) -> None:
        """Share nothing with graphs to come where none is left: torch takes no memory again that no graph holds."""
        if not self.graphs:
            self.pool.clear()

    def passed(self, step: Step, due: tuple[bool, ...]) -> None:
        """Keep count on the host of a call that ran on the device."""
        for (kept, _), chose in zip(self.chosen, due, strict=True):
            if chose:
                kept.since = step.columns
        for store in self.rings:
            store.passed(step.end)

    def undo(self, since: list[int | None]) -> None:
        """Choices are as old as they were: a call that was to make some anew computed nothing."""
        for (kept, _), columns in zip(self.chosen, since, strict=True):
            kept.since = columns


def is_round(plan: Plan, cache: LongContextCache, kwargs: Mapping[str, Any], tokens: Tensor) -> bool:
    """True for a round of one stream that has the form in which it can be recorded.

    Args:
        plan: in force: keys are rotated where they are read, so that no place of a token is known to kernels by value.
        cache: of the call.
        kwargs: its arguments.
        tokens: `[B, T, hidden]`, its input; in 16 bits, as the kernel that takes places from the device has it.
    """
    alike = cache.ledger.rows == 1 and cache.ledger.lengths is None and kwargs.get("attention_mask") is None
    return plan.at_read and alike and FEW < tokens.shape[1] <= MOST_TOKENS and tokens.dtype in ROUND_DTYPES
