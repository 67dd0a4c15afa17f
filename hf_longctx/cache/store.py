"""The only owner of KV memory: for each group of heads of a layer, one preallocated tensor that grows by pages.

A row's token `p` lives in slot `p`; where retention has a window, tokens beyond the sinks go round in a ring, so that
the newest overwrites the oldest exactly when that leaves the window. Which token a slot holds follows from the row's
length alone; there is no table to keep in step. Padding is never stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import ops
from ..plan import Retention
from .step import Step

PAGE = 64
"""Tokens by which a store grows at least; a page of one row and KV head is contiguous."""

GROWTH = 32
"""A full store grows by one part in so many: the room that it holds for tokens to come stays below 4 % of its bytes."""

ROLLBACK = 128
"""Tokens beyond the window that stay while `crop` may take tokens back (assisted decoding)."""


@dataclass(frozen=True)
class View:
    """Keys and values that a call's queries may see, sinks first; of several tokens in the order of positions.

    Args:
        k: `[B, Hkv, S, D]`.
        v: `[B, Hkv, S, Dv]`.
        k_pos: `[B or 1, S]`, int64, -1 where empty; None: columns are positions and all are filled.
    """

    k: Tensor
    v: Tensor
    k_pos: Tensor | None


class Store:
    """KV memory of one group of heads.

    Attributes:
        retention: what stays.
        k, v: `[B, Hkv, capacity, D]`, or None before the first token.
        floor: `[B or 1, 1]`, int64, oldest position outside the sinks that a window grown wider again still finds; None
            as long as it never grew.
    """

    def __init__(self, retention: Retention) -> None:
        self.retention = retention
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.floor: Tensor | None = None
        self._ring: int | None = retention.window  # tokens that go round; None: nothing is ever overwritten
        self._lost = 0  # columns before this one were overwritten, sinks aside
        self._rollback = 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of the live tensors."""
        return sum(x.nbytes for x in (self.k, self.v) if x is not None)

    @property
    def limit(self) -> int | None:
        """Most tokens of a row that are ever stored; None: no bound."""
        return None if self._ring is None else self.retention.sink + self._ring

    def append(self, k: Tensor, v: Tensor, step: Step) -> View:
        """Store the call's tokens and return all that its queries may see. What leaves the window is overwritten.

        Args:
            k: `[B, Hkv, T, D]`, rotated as it will be read, each row's real tokens first (`step.order`).
            v: `[B, Hkv, T, Dv]`, likewise.
            step: the call.
        """
        self._fit(step)
        if step.columns == 0:
            self._write(k, v, step)
            return View(k, v, step.pos if step.ragged else None)
        if self._ring is None or step.tokens == 1:
            self._write(k, v, step)
            return self._in_place(step)
        view = self._in_order(k, v, step)
        self._write(k, v, step)
        return view

    def crop(self, tokens: int, columns: int) -> None:
        """Check that the last `tokens` of `columns` columns can be taken back.

        Raises:
            ValueError: tokens that were overwritten would be seen again.
        """
        sink, window, end = self.retention.sink, self.retention.window, columns - tokens
        if window is None or max(sink, end - window + 1) >= min(end, self._lost):
            return
        raise ValueError(
            f"crop: expected at most {max(0, columns - window + 1 - self._lost)} tokens, because older ones have left "
            f"the window of {window} for good; got {tokens}. Call cache.activate_past_recording() before the tokens "
            f"come in: then {ROLLBACK} can be taken back. Or start a new cache."
        )

    def record(self) -> None:
        """Hold `ROLLBACK` tokens beyond the window from the next call on, so that `crop` can take tokens back."""
        self._rollback = ROLLBACK

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`; pick: `[B']`, int64."""
        if self.k is not None and self.v is not None:
            self.k = self.k.index_select(0, pick.to(self.k.device))
            self.v = self.v.index_select(0, pick.to(self.v.device))
        if self.floor is not None and self.floor.shape[0] > 1:
            self.floor = self.floor.index_select(0, pick.to(self.floor.device))

    # which token is where -----------------------------------------------------------------------------------------

    def _slot(self, pos: Tensor, ring: int | None) -> Tensor:
        sink = self.retention.sink
        return pos if ring is None else torch.where(pos < sink, pos, sink + (pos - sink) % ring)

    def _held(self, lengths: Tensor, slots: int) -> Tensor:
        """Position in each of the first slots when rows are `lengths` long, -1 for none: `[B or 1, slots]`."""
        slot = torch.arange(slots, device=lengths.device)[None]
        last = lengths[:, None] - 1
        held = slot
        if self._ring is not None:
            turns = (last - slot).clamp(min=0) // self._ring
            held = torch.where(slot < self.retention.sink, slot, slot + turns * self._ring)
        return torch.where(slot <= last, held, -1)

    def _fit(self, step: Step) -> None:
        """Give the ring the size that this call needs, keeping what it holds."""
        reach = self.retention.reach(step.tokens)
        size = None if reach is None else reach + self._rollback
        if size == self._ring:
            return
        old, self._ring = self._ring, size
        if reach is not None and old is not None and old < reach and step.columns:
            self.floor = step.lengths[:, None] - old
        if self.k is None or self.v is None or old is None or size is None:
            return
        sink, slots = self.retention.sink, min(step.columns, self.retention.sink + size)
        if step.columns > sink + size:
            self._lost = max(self._lost, step.columns - size)
        index = self._slot(self._held(step.lengths, slots).clamp(min=0), old).expand(self.k.shape[0], -1)
        self.k, self.v = ops.take_tokens(self.k, index), ops.take_tokens(self.v, index)

    # reading --------------------------------------------------------------------------------------------------------

    def _in_order(self, k: Tensor, v: Tensor, step: Step) -> View:
        """Sinks, then the window's tokens right-aligned, then the call's own: a copy, as writing overwrites some."""
        assert self.k is not None and self.v is not None and self._ring is not None
        sink, before, after = self.retention.sink, step.lengths[:, None], step.lengths_after[:, None]
        first = torch.arange(min(sink, step.columns + step.tokens), device=step.device)[None]
        width = min(self._ring, max(0, step.columns - sink))
        rest = before - width + torch.arange(width, device=step.device)
        rest = torch.where(rest >= sink, rest, -1)
        old = first < before  # a row that was all padding so far brings its sinks along with this call
        index = self._slot(rest.clamp(min=0), self._ring).expand(k.shape[0], -1)
        keys, values = (
            torch.cat((_mixed(s, x, first, before, old), ops.take_tokens(s, index), x), 2)
            for s, x in ((self.k, k), (self.v, v))
        )
        parts = [torch.where(first < after, first, -1), rest, torch.where(step.pos >= sink, step.pos, -1)]
        rows = max(part.shape[0] for part in parts)
        return View(keys, values, torch.cat([part.expand(rows, -1) for part in parts], 1))

    def _in_place(self, step: Step) -> View:
        """The filled slots, as they lie."""
        assert self.k is not None and self.v is not None
        end = step.columns + step.tokens
        slots = end if self.limit is None else min(end, self.limit)
        straight = slots == end and not step.ragged
        k_pos = None if straight else self._held(step.lengths_after, slots)
        return View(self.k[:, :, :slots], self.v[:, :, :slots], k_pos)

    # writing --------------------------------------------------------------------------------------------------------

    def _write(self, k: Tensor, v: Tensor, step: Step) -> None:
        end = step.columns + step.tokens
        self._reserve(k, v, end if self.limit is None else min(end, self.limit))
        assert self.k is not None and self.v is not None
        if self._ring is not None and end > self.retention.sink + self._ring:
            self._lost = max(self._lost, end - self._ring)
        if not step.ragged:
            self._write_rows(slice(None), k, v, step.columns, step.tokens)
        elif step.tokens == 1:
            slots = self._slot(step.lengths[:, None], self._ring)
            for store, fresh in ((self.k, k), (self.v, v)):
                ops.append(store, fresh, slots, step.real)
        else:
            for row, (first, count) in enumerate(step.spans):
                self._write_rows(slice(row, row + 1), k, v, first, count)

    def _write_rows(self, rows: slice, k: Tensor, v: Tensor, first: int, count: int) -> None:
        """Write `count` tokens from position `first` on, for rows that are alike: runs of slots without a jump."""
        assert self.k is not None and self.v is not None
        sink, last = self.retention.sink, first + count
        runs = [(first, min(sink, last), first)]
        start = max(first, sink) if self._ring is None else max(first, sink, last - self._ring)
        while start < last:
            slot = start if self._ring is None else sink + (start - sink) % self._ring
            stop = last if self._ring is None else min(last, start + sink + self._ring - slot)
            runs.append((start, stop, slot))
            start = stop
        for start, stop, slot in runs:
            if start < stop:
                span = slice(start - first, stop - first)
                ops.append(self.k[rows], k[rows, :, span], slot)
                ops.append(self.v[rows], v[rows, :, span], slot)

    def _reserve(self, k: Tensor, v: Tensor, tokens: int) -> None:
        """Make room for `tokens` tokens a row."""
        have = 0 if self.k is None else self.k.shape[2]
        if tokens <= have:
            return
        size = -(-max(tokens, have + have // GROWTH) // PAGE) * PAGE
        size = size if self.limit is None else min(size, self.limit)
        self.k, self.v = _grown(self.k, k, size), _grown(self.v, v, size)


def _grown(store: Tensor | None, fresh: Tensor, size: int) -> Tensor:
    grown = fresh.new_zeros(*fresh.shape[:2], size, fresh.shape[3])
    if store is not None:
        grown[:, :, : store.shape[2]] = store
    return grown.detach()


def _mixed(store: Tensor, fresh: Tensor, first: Tensor, before: Tensor, old: Tensor) -> Tensor:
    """The tokens at positions `first`, out of the store where they are `old`, else out of the call."""
    rows = fresh.shape[0]
    stored = ops.take_tokens(store, first.clamp(max=store.shape[2] - 1).expand(rows, -1))
    own = (first - before).clamp(0, fresh.shape[2] - 1).expand(rows, -1)
    return torch.where(old[:, None, :, None], stored, ops.take_tokens(fresh, own))
