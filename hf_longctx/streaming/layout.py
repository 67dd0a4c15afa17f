"""Which spans a row of the cache holds, in their order, and where its next token stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..cache.spans import Span


@dataclass
class Held:
    """A span in the cache.

    Args:
        kind: as `Span`.
        number: as `Span`.
        t: as `Span`.
        pinned: as `Span`.
        ids: its tokens so far.
        extent: by how much it moves what follows: tokens, or steps of a position with three numbers.
        reserved: tokens to come, counted as if they were there.
    """

    kind: Literal["text", "vision"]
    number: int
    t: float
    pinned: bool
    ids: list[int] = field(default_factory=list)
    extent: int = 0
    reserved: int = 0

    @property
    def span(self) -> Span:
        """As retention sees it."""
        return Span(self.kind, max(len(self.ids), self.reserved), self.number, self.t, self.pinned)


@dataclass
class Row:
    """One stream's part of the cache.

    Args:
        spans: stored, in order.
        next: where the next token stands.
        pending: tokens of the last span that the cache has not seen yet.
        counts: how many spans of each kind there ever were, pinned ones aside.
    """

    spans: list[Held] = field(default_factory=list)
    next: int = 0
    pending: list[int] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"text": 0, "vision": 0})

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return sum(len(held.ids) for held in self.spans)

    def of(self, kind: str) -> int:
        """Tokens of a kind in the cache."""
        return sum(len(held.ids) for held in self.spans if held.kind == kind)

    def new(self, kind: Literal["text", "vision"], t: float, reserved: int, pinned: bool = False) -> Held:
        """A span that may be added, with nothing in it."""
        return Held(kind, 0 if pinned else self.counts[kind], t, pinned, reserved=reserved)

    def add(self, held: Held) -> None:
        """Let a span be the last one."""
        self.spans.append(held)
        if not held.pinned:
            self.counts[held.kind] += 1

    def drop(self, stays: Sequence[bool]) -> tuple[list[int], list[int]]:
        """Let spans go.

        Returns:
            Slots of the tokens that stay, and by how much each moves up.
        """
        slots: list[int] = []
        shifts: list[int] = []
        slot = shift = 0
        for held, keep in zip(self.spans, stays, strict=True):
            if keep:
                slots += range(slot, slot + len(held.ids))
                shifts += [shift] * len(held.ids)
            else:
                shift += held.extent
            slot += len(held.ids)
        self.spans = [held for held, keep in zip(self.spans, stays, strict=True) if keep]
        self.next -= shift
        return slots, shifts

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {**vars(self), "spans": [vars(held) for held in self.spans]}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Row:
        """What `to_dict` gave."""
        return Row(**{**values, "spans": [Held(**held) for held in values["spans"]]})
