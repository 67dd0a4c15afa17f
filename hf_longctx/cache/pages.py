"""Which place on the device a block has whose store lies in host memory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..plan import HeadPolicy
from .placement import HostLRU
from .rows import slot_of
from .step import FEW


@dataclass(frozen=True)
class Pages:
    """The places of a row and KV head, in blocks: those of the sinks, a ring of the last ones, then a pool.

    Args:
        block: tokens of a block.
        sinks: blocks of sinks.
        tail: blocks that go round, as many as are local to a query, and two calls more.
        pool: blocks for whatever else is selected.
    """

    block: int
    sinks: int
    tail: int
    pool: int

    @staticmethod
    def of(policy: HeadPolicy) -> Pages:
        """As many as a policy needs."""
        selector, placement = policy.decode, policy.placement
        assert selector is not None and selector.budget.tokens is not None and isinstance(placement, HostLRU)
        block, most = selector.block, max(selector.scorer.q_block, FEW)
        again = -(-selector.refresh_every // block)  # blocks that were local when a selection was made
        pool = max(placement.resident_blocks, selector.budget.tokens // block + again)
        return Pages(block, selector.sink_blocks, -(-(selector.local + 2 * most) // block) + 3, pool)

    @property
    def slots(self) -> int:
        """Tokens that there is room for in a long row."""
        return (self.sinks + self.tail + self.pool) * self.block

    def slots_at(self, tokens: int) -> int:
        """Tokens that there is room for in a row of `tokens`: as long as it is short, its blocks."""
        return min(-(-tokens // self.block) * self.block, self.slots)

    @property
    def ring(self) -> int:
        """Tokens that go round."""
        return self.tail * self.block

    def slot(self, pos: Tensor) -> Tensor:
        """Where a token at a position lies, if it is among the sinks or the last ones."""
        return slot_of(pos, self.sinks * self.block, self.ring)

    def page(self, ids: Tensor) -> Tensor:
        """Where a block lies, likewise."""
        return slot_of(ids, self.sinks, self.tail)

    def is_far(self, ids: Tensor, ends: Tensor) -> Tensor:
        """Which blocks have no place of their own any more in rows of `ends` tokens; bool, of the common shape."""
        return (ids >= self.sinks) & (ids <= (ends - 1) // self.block - self.tail)

    def lost(self, before: int, end: int) -> list[int]:
        """Blocks that the ring gave up while a row had `before` tokens, and that it must hold when it has `end`."""
        held = (before - 1) // self.block - self.tail  # the last that it gave up
        last = (end - 1) // self.block
        return list(range(max(self.sinks, last - self.tail + 1), min(last, held) + 1))
