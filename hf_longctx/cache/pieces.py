"""A call cut at multiples of some size of each row's text: into blocks of queries, or into calls that follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import ops
from .step import Step


@dataclass(frozen=True)
class Blocks:
    """The queries of a call in blocks of `size` positions, each block's tokens first in it.

    A block of queries is `[n * size, (n + 1) * size)` of the row's text, as far as the call has it; rows that begin at
    different places have their blocks side by side.

    Args:
        size: places of a block.
        pos: `[B or 1, N * size]`, int64, position at each place, -1 where there is no query.
        index: `[B or 1, N * size]`, int64, the call's token at each place; None: place i is token i.
        place: `[B or 1, T]`, int64, the place of each token; None with `index`.
    """

    size: int
    pos: Tensor
    index: Tensor | None
    place: Tensor | None

    @staticmethod
    def of(step: Step, size: int) -> Blocks:
        """The blocks of a call, whose rows have their real tokens first."""
        offset = step.columns % size
        if size == 1 or (not step.ragged and offset == 0 and step.tokens % size == 0):
            return Blocks(size, step.pos, None, None)
        count = (step.lengths_after - step.lengths)[:, None, None]
        behind = step.lengths[:, None, None] % size  # positions of the first block that came in earlier calls
        number = -(-(step.tokens + (size - 1 if step.ragged else offset)) // size)
        n = torch.arange(number, device=step.device)[None, :, None]
        t = torch.arange(size, device=step.device)[None, None]
        index = (n * size - behind).clamp(min=0) + t
        there = index < torch.minimum(count, (n + 1) * size - behind)
        pos = torch.where(there, step.lengths[:, None, None] + index, -1)
        token = torch.arange(step.tokens, device=step.device)[None]
        block = (token + behind[:, 0]) // size
        place = block * size + token - (block * size - behind[:, 0]).clamp(min=0)
        return Blocks(size, pos.flatten(1), index.clamp(max=step.tokens - 1).flatten(1), place)

    @property
    def number(self) -> int:
        """Blocks, N."""
        return self.pos.shape[1] // self.size

    def take(self, q: Tensor, first: int, last: int) -> Tensor:
        """Queries of blocks `first` to `last - 1`: `[B, Hq, (last - first) * size, D]`, anything where none is."""
        places = slice(first * self.size, last * self.size)
        if self.index is None:
            return q[:, :, places]
        return ops.take_tokens(q, self.index[:, places].expand(q.shape[0], -1))

    def restore(self, out: Tensor) -> Tensor:
        """What all blocks gave `[B, Hq, N * size, Dv]`, in the order of the call's tokens: `[B, Hq, T, Dv]`."""
        return out if self.place is None else ops.take_tokens(out, self.place.expand(out.shape[0], -1))


def pieces(step: Step, size: int) -> Iterator[tuple[Tensor | slice, Step]]:
    """A call as several that follow each other, cut at multiples of `size` of each row's text.

    Yields:
        Which of the call's tokens a piece has (`[B, size]`, int64, or a slice), and its step.
    """
    if step.tokens == 1:
        yield slice(0, 1), step
        return
    if not step.ragged:
        start = 0
        while start < step.tokens:
            stop = min(step.tokens, start + size - (step.columns + start) % size)
            yield (
                slice(start, stop),
                Step(step.columns + start, stop - start, step.device, step.lengths + start, None, False),
            )
            start = stop
        return
    blocks = Blocks.of(step, size)
    count = step.lengths_after - step.lengths
    behind = step.lengths % size
    for n in range(blocks.number):
        places = slice(n * size, (n + 1) * size)
        before = torch.minimum(count, (n * size - behind).clamp(min=0))
        index = torch.arange(size, device=step.device)[None] + before[:, None]
        columns = step.columns + min(step.tokens, n * size)
        yield (
            index.clamp(max=step.tokens - 1),
            Step(columns, size, step.device, step.lengths + before, blocks.pos[:, places] >= 0, True),
        )
