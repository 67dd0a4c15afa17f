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
    """Whole blocks of several tensors, by row, head and place in the text; the bytes of a block lie in one run.

    Args:
        block: tokens of a block.
        disk: folder of the files, or None for memory. A file has no name from the start, so that it goes away with the
            last tensor on it, however the process ends.
    """

    def __init__(self, block: int, disk: str | None) -> None:
        self.block, self.disk = block, disk
        self.per_segment = -(-SEGMENT // block)
        self._parts: list[tuple[torch.dtype, int]] = []  # of each tensor, what a token has in it
        self._segments: list[Tensor] = []  # `[B, H, per_segment, bytes of a block]`, uint8

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.nbytes for segment in self._segments)

    def tokens_at(self, tokens: int) -> int:
        """Tokens that there is room for when a row has `tokens`: whole segments of its full blocks."""
        return -(-(tokens // self.block) // self.per_segment) * self.per_segment * self.block

    def reserve(self, like: Sequence[Tensor], blocks: int) -> None:
        """Make room for `blocks` blocks a row; like: `[B, H, ?, d]` each, on the device that they come from."""
        self._parts = [(x.dtype, x.shape[3]) for x in like]
        size = self.block * sum(x.shape[3] * x.itemsize for x in like)
        while len(self._segments) * self.per_segment < blocks:
            shape = (*like[0].shape[:2], self.per_segment, size)
            self._segments.append(self._empty(shape, like[0].device.type == "cuda"))

    def taken(self, sources: Sequence[Tensor], rows: Tensor, pages: Tensor, wait: bool) -> Tensor:
        """The bytes of blocks of all heads of some rows, on the host: `[n, H, bytes]`.

        Args:
            sources: `[B, H, P, block * d]` each.
            rows: `[n]`, int64, on the host.
            pages: `[n]`, int64, likewise, which of the P blocks.
            wait: False leaves the copy under way: nothing may look at it before the device has caught up.
        """
        if not len(rows):
            return torch.empty(0)
        row, page = torch.stack((rows, pages)).to(sources[0].device, non_blocking=True).unbind()
        joined = torch.cat([x[row, :, page].view(torch.uint8) for x in sources], -1)
        return joined.to("cpu", non_blocking=not wait)

    def put(self, rows: Tensor, ids: Tensor, joined: Tensor) -> None:
        """Hold blocks of all heads of some rows.

        Args:
            rows: `[n]`, int64, on the host, like the next two.
            ids: `[n]`, int64, places in the text.
            joined: `[n, H, bytes]`, from `taken`, with the copy at its end.
        """
        if not len(ids):
            return
        index, inside = ids // self.per_segment, ids % self.per_segment
        word = torch.uint8 if joined.shape[-1] % 8 else torch.int64  # copied word by word
        joined = joined.view(word)
        for number in range(int(index.min()), int(index.max()) + 1):
            here = (index == number).nonzero()[:, 0]
            self._segments[number].view(word)[rows[here], :, inside[here]] = joined[here]

    def bring(self, targets: Sequence[Tensor], rows: Tensor, heads: Tensor, ids: Tensor, pages: Tensor) -> None:
        """Copy blocks one by one into places of tensors.

        Args:
            targets: `[B, H, P, block * d]` each.
            rows: `[n]`, int64, on the host, like the next three.
            heads: heads.
            ids: places in the text.
            pages: which of the P blocks they become.
        """
        if not len(ids):
            return
        (_, count, places, _), device = targets[0].shape, targets[0].device
        found, order = self._get(rows, heads, ids)
        lines = ((rows * count + heads) * places + pages)[order].to(device, non_blocking=True)
        for target, x in zip(targets, self._apart(found.to(device, non_blocking=True)), strict=True):
            target.view(-1, target.shape[3]).index_copy_(0, lines, x)

    def copy_to(self, targets: Sequence[Tensor], blocks: int) -> None:
        """Copy the first `blocks` blocks, or a few more, into tensors `[B, H, M, block * d]`."""
        for start in range(0, blocks, self.per_segment):
            segment = self._segments[start // self.per_segment].to(targets[0].device, non_blocking=True)
            for target, x in zip(targets, self._apart(segment), strict=True):
                place = target[:, :, start : start + self.per_segment]
                place.copy_(x[:, :, : place.shape[2]])

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`, one segment after the other."""
        pick = pick.cpu()
        for index, segment in enumerate(self._segments):
            fresh = self._empty((len(pick), *segment.shape[1:]), segment.is_pinned())
            torch.index_select(segment, 0, pick, out=fresh)
            self._segments[index] = fresh

    def _get(self, rows: Tensor, heads: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks in memory that a device can read directly, `[n, bytes]`, and the order in which they come, `[n]`."""
        index, order = (ids // self.per_segment).sort()
        _, count, _, size = self._segments[0].shape
        lines = ((rows * count + heads) * self.per_segment + ids % self.per_segment)[order]
        out = torch.empty(len(ids), size, dtype=torch.uint8, pin_memory=self._segments[0].is_pinned())
        start = 0
        for number, found in enumerate(index.bincount().tolist()):
            if found:
                part = slice(start, start + found)
                torch.index_select(self._segments[number].view(-1, size), 0, lines[part], out=out[part])
                start += found
        return out, order

    def _apart(self, joined: Tensor) -> list[Tensor]:
        """Bytes of blocks `[..., bytes]` as blocks of each tensor, `[..., block * d]`, sharing memory."""
        sizes = [self.block * width * dtype.itemsize for dtype, width in self._parts]
        return [
            x.view(dtype) for x, (dtype, _) in zip(torch.split_with_sizes(joined, sizes, -1), self._parts, strict=True)
        ]

    def _empty(self, shape: tuple[int, ...], pin: bool) -> Tensor:
        """Zeros: what was never written is read along with its segment, and must not be NaN."""
        if self.disk is None:
            return torch.zeros(shape, dtype=torch.uint8, pin_memory=pin)
        size = torch.Size(shape).numel()
        with tempfile.TemporaryFile(dir=self.disk) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk says so now, not by a signal later
            memory = mmap.mmap(file.fileno(), size)
        return torch.frombuffer(memory, dtype=torch.uint8).view(shape)
