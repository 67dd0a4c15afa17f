"""Which blocks are in the pool of each row and KV head, the least recently used first; only the device knows."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .rows import picked


class Pool:
    """An empty pool.

    Args:
        rows, heads, places: sizes.
        device: where its tensors live.

    Attributes:
        held: `[B, Hkv, 2, P]`, int32, as in `ops.bring_blocks`.
        counts: `[2]`, int64, blocks that were asked for and were there, and those that were not.
    """

    def __init__(self, rows: int, heads: int, places: int, device: torch.device) -> None:
        self.held = _empty(places, device).repeat(rows, heads, 1, 1)
        self.counts = torch.zeros(2, dtype=torch.int64, device=device)

    def forget(self, first: Tensor) -> None:
        """Blocks of each row from `first` on, `[B or 1]`, are no longer what they were; their places are taken next."""
        spots, blocks = self.held.unbind(2)
        blocks = blocks.where(blocks < first[:, None, None], -1)
        used = torch.arange(blocks.shape[2], device=blocks.device)
        order = used.where(blocks >= 0, spots - blocks.shape[2]).argsort(
            dim=-1
        )  # a new block gets the first free place
        self.held.copy_(torch.stack((spots.gather(2, order), blocks.gather(2, order)), 2))

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`."""
        self.held = picked(self.held, pick)


@lru_cache(maxsize=64)
def _empty(places: int, device: torch.device) -> Tensor:
    """`[2, P]`, int32, no block in any place; the same for all layers."""
    spots = torch.arange(places, dtype=torch.int32, device=device)
    return torch.stack((spots, torch.full_like(spots, -1)))
