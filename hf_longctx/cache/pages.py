"""Which place on the device a block has whose store lies in host memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import ops
from ..plan import HeadPolicy
from .place import slot_of
from .placement import HostLRU
from .rows import Stored, each
from .step import FEW, Step


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
    def most(self) -> int:
        """Tokens of such a text; of a longer one the host has blocks."""
        return self.own * self.block

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

    def pieces(self, step: Step) -> Iterator[tuple[slice, Step]]:
        """A call in pieces that leave the ring time to be copied: which of its tokens, and these as a call."""
        size = self.ring - self.block
        for start in range(0, step.tokens, size):
            span = slice(start, min(step.tokens, start + size))
            yield span, step if span.stop - start == step.tokens else step.part(start, span.stop)


def gathered(
    pages: Pages, memory: tuple[Stored, Stored], host: ops.HostBlocks, lengths: Tensor, columns: int
) -> tuple[Stored, Stored]:
    """Whole blocks of all keys and values of a store, each at its id: `[B, Hkv, >= columns, ?]` each.

    Args:
        pages: where blocks lie on the device.
        memory: keys and values there.
        host: has the others.
        lengths: `[B or 1]`, int64, tokens of each row.
        columns: no row is longer.
    """
    block, blocks = pages.block, -(-columns // pages.block)
    keys, values = (each(x, lambda x: x.new_zeros(*x.shape[:2], blocks * block, x.shape[3])) for x in memory)
    first, last = torch.full_like(lengths, pages.sinks), pages.far_from(lengths)
    ops.copy_blocks(keys, values, host, first, last, blocks, ops.Places(block, blocks, 1), out=False)
    near, index = pages.near(torch.arange(blocks, device=lengths.device)[None], lengths)
    for target, x in zip(pages.paged(keys, values), pages.paged(*memory), strict=True):
        own = ops.take_tokens(x, index.expand(x.shape[0], -1))
        target.copy_(torch.where(near[:, None, :, None], own, target))
    return keys, values
