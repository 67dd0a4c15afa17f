"""Which place on the device a block has whose store lies in host memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import ops
from ..plan import HeadPolicy
from .place import slot_of
from .placement import HostLRU
from .step import FEW


@dataclass(frozen=True)
class Pages(ops.Places):
    """The places of a row and KV head, as many as a policy needs.

    Args:
        pool: blocks for whatever is read beside the sinks and the last ones.
    """

    pool: int

    @staticmethod
    def of(policy: HeadPolicy) -> Pages:
        """The last blocks are as many as are local to a query, and two calls more."""
        selector, placement = policy.decode, policy.placement
        assert selector is not None and selector.budget.tokens is not None and isinstance(placement, HostLRU)
        block, most = selector.block, max(selector.scorer.q_block, FEW)
        again = -(-selector.refresh_every // block)  # blocks that were local when a selection was made
        pool = max(placement.resident_blocks, selector.budget.tokens // block + again)
        return Pages(block, selector.sink_blocks, -(-(selector.local + 2 * most) // block) + 3, pool)

    @property
    def own(self) -> int:
        """Blocks of the longest text in which every block has a place of its own."""
        return self.sinks + self.tail

    @property
    def slots(self) -> int:
        """Tokens that there is room for in a long row."""
        return (self.own + self.pool) * self.block

    def slots_at(self, tokens: int) -> int:
        """Tokens that there is room for in a row of `tokens`: as long as it is short, its blocks."""
        return min(-(-tokens // self.block) * self.block, self.slots)

    @property
    def ring(self) -> int:
        """Tokens that go round."""
        return self.tail * self.block

    @property
    def round(self) -> tuple[int, int]:
        """Tokens that stay where they are, and those that go round behind them."""
        return self.sinks * self.block, self.ring

    def slot(self, pos: Tensor) -> Tensor:
        """Where a token at a position lies, if it is among the sinks or the last ones."""
        return slot_of(pos, *self.round)

    def near(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Which blocks rows of `lengths` tokens have at places of their own, and these places, 0 for others."""
        near = (ids * self.block < lengths[:, None]) & ~self.is_far(ids, lengths[:, None])
        return near, torch.where(near, self.page(ids), 0)

    def far_from(self, lengths: Tensor) -> Tensor:
        """The first block behind those that have no place of their own any more in rows of so many tokens."""
        return (lengths - 1) // self.block - self.tail + 1

    def lost(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """First block, and the one behind the last, that the ring gave up and must hold in a row cut off.

        Args:
            before: `[B or 1]`, int64, tokens of each row before it was cut off.
            after: `[B or 1]`, int64, and now.
        """
        last = (after - 1) // self.block + 1
        return (last - self.tail).clamp(min=self.sinks), last.minimum(self.far_from(before))
