"""What an index needs: keys that can be read by position, and the arithmetic that sums them up."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from ..plan import Summary


class Keys(Protocol):
    """Where the stored keys of a row can be read, by position."""

    def take(self, index: Tensor) -> Tensor:
        """Keys at positions `[B, N]`: `[B, H, N, D]`."""

    def span(self, rows: slice, first: int, last: int) -> Tensor:
        """Keys at positions `first` to `last - 1` of some rows."""


class Folding(Summary, Protocol):
    """A summary with its arithmetic (`select/summaries.py`)."""

    def fold(self, k: Tensor, filled: Tensor | None, mass: Tensor | None) -> Tensor:
        """Entries of sub-blocks: `[..., sub, D]` to `[..., R, D]`."""


@runtime_checkable
class Packing(Protocol):
    """A summary whose entries may be held in few bits."""

    @property
    def bits(self) -> int | None:
        """4 or 8; None: as keys are."""
