"""Which spans a row of the cache holds, in their order, and where its next token stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..cache.retention import ModalityWindow
from ..cache.spans import Span

Run = tuple[int, int, int]
"""Numbers that are not listed: the first, how many there are, and by how much each is more than the one before."""


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

    def new(self, kind: Literal["text", "vision"], t: float, reserved: int, pinned: bool = False) -> Held:
        """A span that may be added, with nothing in it."""
        return Held(kind, 0 if pinned else self.counts[kind], t, pinned, reserved=reserved)

    def add(self, held: Held) -> None:
        """Let a span be the last one."""
        self.spans.append(held)
        if not held.pinned:
            self.counts[held.kind] += 1

    def stays(self, window: ModalityWindow, new: Sequence[Held]) -> tuple[bool, ...]:
        """Which spans stay when a turn and its answer come.

        Raises:
            ValueError: the window does not hold them.
        """
        if new:
            turn, answer = new
            pins = turn.reserved + sum(len(held.ids) for held in self.spans if held.pinned)
            free = turn.kind == "text" and not turn.pinned
            _check("vision_tokens", window.vision_tokens, turn.reserved if turn.kind == "vision" else 0)
            _check("text_sink", window.text_sink, pins if turn.pinned else 0)
            _check("text_window", window.text_window, answer.reserved + (turn.reserved if free else 0))
        return window.keep([held.span for held in (*self.spans, *new)])[: len(self.spans)]

    def take_in(self, parts: Sequence[list[int]], new: Sequence[Held], places: Sequence[int]) -> None:
        """Note what is about to be read: the rest of the last span, and new ones.

        Args:
            parts: what is pending, the turn, and the wish for an answer.
            new: spans of the turn and of the answer; none: nothing is read.
            places: where its tokens stand.
        """
        if not new:
            return
        ends, at = [*places, places[-1] + 1], 0
        for number, part in enumerate(parts[: 1 + len(new)]):
            if number:
                self.add(new[number - 1])
            if number or part:
                self.spans[-1].ids += part
                self.spans[-1].extent += ends[at + len(part)] - ends[at]
            at += len(part)
        self.next, self.pending = ends[-1], []

    def drop(self, stays: Sequence[bool]) -> tuple[list[Run], list[Run]]:
        """Let spans go.

        Returns:
            Slots of the tokens that stay, and by how much each moves up, as runs.
        """
        slots: list[Run] = []
        shifts: list[Run] = []
        slot = shift = 0
        for held, keep in zip(self.spans, stays, strict=True):
            if keep:
                slots.append((slot, len(held.ids), 1))
                shifts.append((shift, len(held.ids), 0))
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


def _check(name: str, limit: int | None, size: int) -> None:
    """Refuse a turn that what holds it is too small for."""
    if limit is not None and size > limit:
        raise ValueError(
            f"stream.Session: expected a turn that fits {name}={limit}, with what must stay beside it; got {size} "
            f"tokens. Give {name}={size} or more, or a smaller turn."
        )
