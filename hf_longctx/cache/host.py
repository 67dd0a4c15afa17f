"""Blocks of keys and values in host memory, or in files that are mapped into it."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops

SEGMENT = 4096
"""Tokens by which the memory grows; it is never copied to grow."""


class HostTier:
    """Memory for the blocks of a store. A CUDA device reads and writes it by itself, unless it is in files.

    Args:
        block: tokens of a block.
        disk: folder of the files, or None for memory. A file has no name from the start, so that it goes away with the
            last tensor on it, however the process ends.

    Attributes:
        table: addresses of the segments, as in `ops.HostBlocks`.
    """

    def __init__(self, block: int, disk: str | None) -> None:
        self.block, self.disk = block, disk
        self.per_segment = -(-SEGMENT // block)
        self.table: Tensor | None = None
        self._segments: list[Tensor] = []

    @property
    def blocks(self) -> ops.HostBlocks:
        """What there is."""
        return ops.HostBlocks(self._segments, self.table)

    @property
    def room(self) -> int:
        """Blocks of a row that there is room for."""
        return len(self._segments) * self.per_segment

    @property
    def nbytes(self) -> int:
        """Bytes of all segments."""
        return sum(segment.nbytes for segment in self._segments)

    def tokens_at(self, tokens: int) -> int:
        """Tokens that there is room for when a row has `tokens`: whole segments of its full blocks."""
        return -(-(tokens // self.block) // self.per_segment) * self.per_segment * self.block

    def reserve(self, like: Sequence[Tensor], blocks: int) -> None:
        """Make room for `blocks` blocks a row; like: `[B, H, ?, d]` each, on the device that they come from."""
        device, size = like[0].device, self.block * sum(x.shape[3] * x.itemsize for x in like)
        pin = device.type == "cuda" and self.disk is None
        shape, segments = (*like[0].shape[:2], self.per_segment, size), [*self._segments]
        while len(segments) * self.per_segment < blocks:
            segments.append(self._empty(shape, pin))
        self._hold(segments, device if pin else None)

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`, one segment after the other; waits for the device."""
        pick = pick.cpu()
        self._settle()
        segments = [self._picked(segment, pick) for segment in self._segments]
        if any(new is not old for new, old in zip(segments, self._segments, strict=True)):
            self._hold(segments, None if self.table is None else self.table.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> HostTier:
        """A copy in memory of its own."""
        self._settle()
        twin, pinned = HostTier(self.block, self.disk), self.table is not None
        segments = [self._empty(tuple(segment.shape), pinned).copy_(segment) for segment in self._segments]
        twin.per_segment = self.per_segment
        twin._hold(segments, None if self.table is None else self.table.device)
        return twin

    def _picked(self, segment: Tensor, pick: Tensor) -> Tensor:
        """The rows `segment[pick]`; in place where there are as many as before."""
        if len(pick) == len(segment):
            return segment.copy_(segment[pick])
        fresh = self._empty((len(pick), *segment.shape[1:]), self.table is not None)
        return torch.index_select(segment, 0, pick, out=fresh)

    def _hold(self, segments: list[Tensor], device: torch.device | None) -> None:
        """Take segments in place of those before, which a device reads and writes by itself; None: no device does."""
        if device is not None:
            places = torch.tensor([segment.data_ptr() for segment in segments], pin_memory=True)
            table = places.to(device, non_blocking=True)  # of memory that is not pinned the copy would wait
            if self.table is None:
                weakref.finalize(self, _settle, device).atexit = False
            self.table = table
        self._segments = segments

    def _settle(self) -> None:
        """Wait until the device reads and writes nothing of it any more."""
        if self.table is not None:
            _settle(self.table.device)

    def _empty(self, shape: tuple[int, ...], pin: bool) -> Tensor:
        """Memory for a segment; of a block that was never written nothing is read."""
        if self.disk is None:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
        size = torch.Size(shape).numel()
        with tempfile.TemporaryFile(dir=self.disk) as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk says so now, not by a signal later
            memory = mmap.mmap(file.fileno(), size)
        return torch.frombuffer(memory, dtype=torch.uint8).view(shape)


def _settle(device: torch.device) -> None:
    """Wait for a device; torch, which gives pinned memory to others when it is free, does not know that it is at work.

    While a graph is being recorded nothing runs: that began with a wait.
    """
    if not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize(device)
