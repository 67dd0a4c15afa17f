"""Which blocks are in a pool of slots, per row and head; the least recently used make room."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Misses:
    """Blocks that must be brought in, one by one.

    Args:
        rows: `[n]`, int64, like the next three.
        heads: heads.
        ids: places in the text.
        slots: where they go.
    """

    rows: Tensor
    heads: Tensor
    ids: Tensor
    slots: Tensor


class Pool:
    """A table of slots on the host.

    Args:
        rows, heads, slots: sizes.

    Attributes:
        hits, misses: blocks that were asked for and were there, or not.
    """

    def __init__(self, rows: int, heads: int, slots: int) -> None:
        self.hits = self.misses = 0
        self._slot_of = torch.full((rows, heads, 1), -1)  # by block
        self._block_in = torch.full((rows, heads, slots), -1)
        self._used = torch.zeros(rows, heads, slots, dtype=torch.int64)
        self._clock = 0

    def claim(self, ids: Tensor) -> tuple[Tensor, Misses]:
        """Give every block a slot.

        Args:
            ids: `[rows, heads, n]`, int64, blocks in any order, -1 for none; of a row and head no more different ones
                than there are slots.

        Returns:
            The slot of each block, -1 for none, and what must be brought in before they are read.
        """
        self._grow(int(ids.max()) + 1 if ids.numel() else 0)
        self._clock += 1
        sorted_ids = ids.sort(-1).values
        first = torch.ones_like(sorted_ids, dtype=torch.bool)
        first[..., 1:] = sorted_ids[..., 1:] != sorted_ids[..., :-1]
        wanted = first & (sorted_ids >= 0)
        assert int(wanted.sum(-1).amax()) <= self._used.shape[2], "more blocks at once than the pool has slots"
        found = self._slot_of.gather(2, sorted_ids.clamp(min=0))
        there = wanted & (found >= 0)
        row, head, place = there.nonzero(as_tuple=True)
        self._used[row, head, found[row, head, place]] = self._clock
        missing = wanted & ~there
        rank = (missing.cumsum(-1) - 1).clamp(min=0)
        oldest = self._used.argsort(dim=-1, stable=True)
        row, head, place = missing.nonzero(as_tuple=True)
        slots, blocks = oldest[row, head, rank[row, head, place]], sorted_ids[row, head, place]
        self._place(row, head, slots, blocks)
        self.hits, self.misses = self.hits + int(there.sum()), self.misses + len(row)
        return torch.where(ids >= 0, self._slot_of.gather(2, ids.clamp(min=0)), -1), Misses(row, head, blocks, slots)

    def forget(self, row: int, first: int) -> None:
        """Blocks of a row from `first` on are no longer what they were."""
        self._slot_of[row, :, first:] = -1
        stale = self._block_in[row] >= first
        self._block_in[row][stale] = -1
        self._used[row][stale] = 0

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`."""
        pick = pick.cpu()
        self._slot_of, self._block_in, self._used = (x[pick] for x in (self._slot_of, self._block_in, self._used))

    def _grow(self, blocks: int) -> None:
        have = self._slot_of.shape[2]
        if blocks > have:
            more = self._slot_of.new_full((*self._slot_of.shape[:2], max(blocks, 2 * have) - have), -1)
            self._slot_of = torch.cat((self._slot_of, more), 2)

    def _place(self, row: Tensor, head: Tensor, slots: Tensor, blocks: Tensor) -> None:
        before = self._block_in[row, head, slots]
        held = before >= 0
        self._slot_of[row[held], head[held], before[held]] = -1
        self._block_in[row, head, slots] = blocks
        self._slot_of[row, head, blocks] = slots
        self._used[row, head, slots] = self._clock
