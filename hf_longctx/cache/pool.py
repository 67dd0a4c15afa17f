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
        self._slot_of = torch.full((rows, heads, 1), -1)  # by block; the last column is that of no block, and stays -1
        self._block_in = torch.full((rows, heads, slots), -1)
        self._used = torch.zeros(rows, heads, slots, dtype=torch.int64)
        self._clock = 0

    def claim(self, ids: Tensor) -> tuple[Tensor, Misses]:
        """Give every block a slot; of slots that were never used, or are free again, the first.

        Args:
            ids: `[rows, heads, n]`, int64, blocks in any order, -1 for none; of a row and head no more different ones
                than there are slots.

        Returns:
            The slot of each block, -1 for none, and what must be brought in before they are read.
        """
        self._grow(int(ids.max()) + 1 if ids.numel() else 0)
        self._clock += 1
        slot_of, block_in, used = (x.flatten(0, 1) for x in (self._slot_of, self._block_in, self._used))
        column = ids.flatten(0, 1) % slot_of.shape[1]  # none: the last one
        asked = torch.zeros_like(slot_of, dtype=torch.bool).scatter_(1, column, True)
        asked[:, -1] = False
        there = asked.gather(1, block_in % slot_of.shape[1])
        used.masked_fill_(there, self._clock)
        missing = asked & (slot_of < 0)
        line, block = missing.nonzero(as_tuple=True)
        slot = line
        if len(line):
            assert int(asked.sum(1).amax()) <= used.shape[1], "more blocks at once than the pool has slots"
            oldest = used.argsort(dim=1, stable=True)
            slot = oldest[line, missing.cumsum(1)[line, block] - 1]
            slot_of[line, block_in[line, slot]] = -1
            slot_of[line, block], block_in[line, slot], used[line, slot] = slot, block, self._clock
        self.hits, self.misses = self.hits + int(there.sum()), self.misses + len(line)
        heads = ids.shape[1]
        return slot_of.gather(1, column).view(ids.shape), Misses(line // heads, line % heads, block, slot)

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
        have = self._slot_of.shape[2] - 1
        if blocks > have:
            grown = self._slot_of.new_full((*self._slot_of.shape[:2], max(blocks, 2 * have) + 1), -1)
            grown[..., :have] = self._slot_of[..., :have]
            self._slot_of = grown
