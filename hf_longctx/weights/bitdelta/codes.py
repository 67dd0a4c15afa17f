"""A table in int8 with a scale for each row: how embeddings may be stored, and how they lie on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """What `Delta.weight` gives in floating point.

    Attributes:
        values: `[rows, columns]`, int8.
        scale: `[rows, 1]`, float32.
    """

    values: Tensor
    scale: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def to(self, device: torch.device, dtype: torch.dtype) -> Codes:
        """The same on a device; they are no floats, whatever is asked for."""
        return Codes(self.values.to(device), self.scale.to(device))

    def floats(self, dtype: torch.dtype) -> Tensor:
        """The table in floating point."""
        return (self.values.float() * self.scale).to(dtype)
