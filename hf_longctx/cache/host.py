"""Blocks of keys and values in host memory, or in files that are mapped into it."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

SEGMENT = 4096
"""Tokens by which the memory grows; it is never copied to grow."""


class HostTier:
    """Whole blocks of several tensors, by row, head and place in the text.

    Args:
        block: tokens of a block.
        disk: folder of the files, or None for memory. A file has no name from the start, so that it goes away with the
            last tensor on it, however the process ends.
    """

    def __init__(self, block: int, disk: str | None) -> None:
        self.block, self.disk = block, disk
        self.per_segment = -(-SEGMENT // block)
        self._segments: list[tuple[Tensor, ...]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(x.nbytes for segment in self._segments for x in segment)

    def tokens_at(self, tokens: int) -> int:
        """Tokens that there is room for when a row has `tokens`: whole segments of its full blocks."""
        return -(-(tokens // self.block) // self.per_segment) * self.per_segment * self.block

    def reserve(self, like: Sequence[Tensor], blocks: int) -> None:
        """Make room for `blocks` blocks a row; like: `[B, H, ?, d]` each, on the device that they come from."""
        while len(self._segments) * self.per_segment < blocks:
            self._segments.append(tuple(self._new(x) for x in like))

    def put(self, rows: slice, first: int, blocks: Sequence[Tensor]) -> None:
        """Copy blocks from `first` on into some rows; blocks: `[b, H, n, block, d]` each."""
        last = first + blocks[0].shape[2]
        for index in range(first // self.per_segment, -(-last // self.per_segment)):
            start = index * self.per_segment
            low, high = max(first, start), min(last, start + self.per_segment)
            for segment, x in zip(self._segments[index], blocks, strict=True):
                segment[rows, :, low - start : high - start].copy_(x[:, :, low - first : high - first])

    def get(self, rows: Tensor, heads: Tensor, ids: Tensor) -> list[Tensor]:
        """Blocks one by one: `[n, block, d]` of each tensor, in memory that a device can read directly.

        Args:
            rows: `[n]`, int64, on the host, like the next two.
            heads: heads.
            ids: places in the text.
        """
        index, inside = ids // self.per_segment, ids % self.per_segment
        shapes = [(len(ids), *x.shape[3:]) for x in self._segments[0]]
        pinned = any(x.is_pinned() for x in self._segments[0])
        out = [
            torch.empty(shape, dtype=x.dtype, pin_memory=pinned)
            for shape, x in zip(shapes, self._segments[0], strict=True)
        ]
        for number in sorted(set(index.tolist())):
            here = (index == number).nonzero()[:, 0]
            for target, segment in zip(out, self._segments[number], strict=True):
                target[here] = segment[rows[here], heads[here], inside[here]]
        return out

    def copy_to(self, targets: Sequence[Tensor]) -> None:
        """Copy all that there is room for into tensors `[B, H, M, block, d]`."""
        for index, segment in enumerate(self._segments):
            start = index * self.per_segment
            for target, x in zip(targets, segment, strict=True):
                place = target[:, :, start : start + self.per_segment]
                place.copy_(x[:, :, : place.shape[2]])

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`, one segment after the other."""
        pick = pick.cpu()
        for index, segment in enumerate(self._segments):
            fresh = tuple(self._empty((len(pick), *x.shape[1:]), x.dtype, x.is_pinned()) for x in segment)
            for new, old in zip(fresh, segment, strict=True):
                torch.index_select(old, 0, pick, out=new)
            self._segments[index] = fresh

    def _new(self, like: Tensor) -> Tensor:
        shape = (*like.shape[:2], self.per_segment, self.block, like.shape[3])
        return self._empty(shape, like.dtype, like.device.type == "cuda")

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype, pin: bool) -> Tensor:
        """Zeros: what was never written is read along with its block, and must not be NaN."""
        if self.disk is None:
            return torch.zeros(shape, dtype=dtype, pin_memory=pin)
        size = torch.Size(shape).numel() * dtype.itemsize
        with tempfile.TemporaryFile(dir=self.disk) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk says so now, not by a signal later
            memory = mmap.mmap(file.fileno(), size)
        return torch.frombuffer(memory, dtype=dtype).view(shape)
