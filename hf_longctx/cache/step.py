"""One call of the decoder, as every layer sees it: where its tokens stand in each row, and which are padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

FEW = 8
"""A call of at most so many tokens on a cache that is not empty is a decode call: each token chooses for itself."""

TAIL = 32
"""Last tokens of a prompt that choose for themselves: a question, and what a chat template puts after it."""


@dataclass(frozen=True)
class Step:
    """The tokens of one call.

    Rows may be padded anywhere: attention works on rows whose real tokens come first (`order`), and `restore` puts its
    results back. Without padding, now and before, no tensor is needed to say where a token stands.

    Args:
        columns: columns of the batch before this call, padding included.
        tokens: columns of this call, T.
        device: where the tensors below live.
        lengths: `[B]` (or `[1]` when all rows are alike), int64, real tokens of each row before this call.
        real: `[B, T]`, bool, False for padding; None if there is none in this call.
        ragged: rows differ in length, or this call has padding, or only the device knows where its tokens stand.
        room: columns for which views and scores are made, at least those after this call; None: just those. A call that
            is recorded and replayed has room for the ones to come.
        expected: columns that the calls of one prompt will come to, so that stores grow once; 0: nobody knows.
        asked: columns that the text may come to soon after, for which stores make room at once, too; 0: likewise.
    """

    columns: int
    tokens: int
    device: torch.device
    lengths: Tensor
    real: Tensor | None
    ragged: bool
    room: int | None = None
    expected: int = 0
    asked: int = 0

    @staticmethod
    def of(
        columns: int,
        tokens: int,
        device: torch.device,
        lengths: Tensor | None,
        mask: Tensor | None,
        look: bool = True,
    ) -> Step:
        """The step that follows `columns` columns.

        Args:
            columns: columns before this call.
            tokens: columns of this call.
            device: of the model's input.
            lengths: `[B]`, int64, real tokens of each row so far, or None while rows are alike.
            mask: `[B, columns + T]`, nonzero for real tokens, or None.
            look: wait for the device to see whether rows that were alike stay so.

        Raises:
            ValueError: a mask of another width, no token, or (looked for in calls of several tokens only, as it waits
                for the device) the cached part of the mask says something else than it said.
        """
        real = None if mask is None else _own(mask, columns, tokens, lengths)
        if not tokens:
            raise ValueError("hf_longctx: expected at least one token in a call; got none. Leave the call out.")
        if real is not None and tokens > 1 and bool(real.all()):
            real = None
        if real is not None and look and tokens == 1 and lengths is None and bool(real.all()):
            real = None  # rows are alike so far: one look keeps them so
        ragged = lengths is not None or real is not None
        if lengths is None:
            rows = 1 if real is None else real.shape[0]
            lengths = torch.full((rows,), columns, dtype=torch.int64, device=device)
        return Step(columns, tokens, device, lengths.to(device), None if real is None else real.to(device), ragged)

    def on(self, device: torch.device) -> Step:
        """The same step with its tensors on another device."""
        if device == self.device:
            return self
        moved = self._elsewhere.get(device)
        if moved is None:
            real = None if self.real is None else self.real.to(device)
            moved = replace(self, device=device, lengths=self.lengths.to(device), real=real)
            self._elsewhere[device] = moved
        return moved

    def part(self, first: int, last: int) -> Step:
        """The call's places `first` to `last - 1` in the order of attention, as a call; once for all layers."""
        made: Step = self.once(("part", first, last), lambda: self._part(first, last))
        return made

    def _part(self, first: int, last: int) -> Step:
        counts = self.lengths_after - self.lengths
        lengths = self.lengths + counts.clamp(max=first)
        place = torch.arange(first, last, device=self.device)
        real = None if self.real is None else place < counts[:, None]
        return replace(self, columns=self.columns + first, tokens=last - first, lengths=lengths, real=real)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What follows from the step alone, so that all layers share it: made by the first that asks."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @cached_property
    def _made(self) -> dict[Any, Any]:
        return {}

    @cached_property
    def _elsewhere(self) -> dict[torch.device, Step]:
        return {}

    @cached_property
    def kind(self) -> str:
        """Type of the device: torch makes the word anew for everyone who asks."""
        return self.device.type

    @property
    def end(self) -> int:
        """Columns of the batch after this call; no row is longer."""
        return self.columns + self.tokens

    @property
    def width(self) -> int:
        """Columns that views and scores are made for."""
        return self.end if self.room is None else self.room

    @property
    def reserved(self) -> int:
        """Columns that stores have room for after this call, at least."""
        return max(self.width, self.expected, self.asked)

    @property
    def first(self) -> int | None:
        """Position of the first token of all rows; None: they differ, or only the device knows."""
        return None if self.ragged else self.columns

    @property
    def decodes(self) -> bool:
        """True for a call of a few tokens that follow others."""
        return self.columns > 0 and self.tokens <= FEW

    @property
    def tail(self) -> Tensor | None:
        """`[B or 1]`, int64, place of the first of a prompt's last tokens; None: the call is not known to have any."""
        left = self.expected - self.end
        return None if self.decodes or not 0 <= left < TAIL else self.lengths_after + (left - TAIL)

    @cached_property
    def lengths_after(self) -> Tensor:
        """`[B or 1]`, int64, real tokens of each row after this call."""
        return self.lengths + (self.tokens if self.real is None else self.real.sum(1))

    def tail_after(self, tail: Tensor | None) -> Tensor | None:
        """`[B]`, int64, real tokens of each row since its last padding after this call; None if there never was any.

        Args:
            tail: the same before this call.
        """
        if self.real is None:
            return None if tail is None else tail + self.tokens
        run = self.real.long().flip(1).cumprod(1).sum(1)
        before = self.columns if tail is None else tail.to(run.device)
        return torch.where(run == self.tokens, run + before, run)

    @cached_property
    def order(self) -> Tensor | None:
        """`[B, T]`, int64, the call's columns with each row's real tokens first; None if they are."""
        if self.real is None or self.tokens == 1:
            return None
        return (~self.real).to(torch.uint8).argsort(dim=1, stable=True)

    @cached_property
    def restore(self) -> Tensor | None:
        """`[B, T]`, int64, the inverse of `order`."""
        return None if self.order is None else self.order.argsort(dim=1)

    @cached_property
    def pos(self) -> Tensor:
        """`[B or 1, T]`, int64, index of each token in its row, in the order of attention; -1 for padding."""
        pos = self.lengths[:, None]
        if self.tokens > 1:
            pos = pos + torch.arange(self.tokens, device=self.device)
        return pos if self.real is None else torch.where(pos < self.lengths_after[:, None], pos, -1)

    @cached_property
    def pos_in_text(self) -> Tensor:
        """`[B or 1, T]`, int64, index of each token in its row, in the order of the call; 0 for padding."""
        return self.pos.clamp(min=0) if self.restore is None else self.pos.clamp(min=0).gather(1, self.restore)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """First position and number of real tokens of each row, on the host; waits for the device."""
        counts = self.lengths_after - self.lengths
        return list(zip(self.lengths.tolist(), counts.tolist(), strict=True))


def _own(mask: Tensor, columns: int, tokens: int, lengths: Tensor | None) -> Tensor:
    """The call's part of an attention mask, after a check that the rest still says what it said."""
    width = mask.shape[1]
    if width != columns + tokens:
        raise ValueError(
            f"attention_mask: expected [B, {columns + tokens}] ({columns} cached + {tokens} new columns); got "
            f"{list(mask.shape)}. Pass the mask of the whole text so far, as generate() does."
        )
    mask = mask.bool()
    if tokens > 1:
        check_cached(mask, columns, lengths)
    return mask[:, columns:]


def check_cached(mask: Tensor, columns: int, lengths: Tensor | None) -> None:
    """Check that a mask has as many real tokens among the cached columns as there were.

    Args:
        mask: `[B, columns or more]`, bool.
        columns: columns so far.
        lengths: `[B]`, int64, real tokens of each row among them, or None if all are.

    Raises:
        ValueError: names the usual cause, which is not an explicit mask.
    """
    if not columns:
        return
    before = mask[:, :columns].sum(1)
    known = before.new_full((1,), columns) if lengths is None else lengths.to(before.device)
    if not bool((before == known).all()):
        raise ValueError(
            f"attention_mask: expected {known.tolist()} real tokens a row among the {columns} cached columns; got "
            f"{before.tolist()}. A cached token cannot be masked afterwards: start a new cache. If you passed no mask, "
            "the text holds pad tokens that the model generated, and generate() takes them for padding: pass "
            "attention_mask=torch.ones_like(input_ids), with zeros for padding of your own."
        )
