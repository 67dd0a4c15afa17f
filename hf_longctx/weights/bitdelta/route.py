"""Which row of a batch belongs to which tenant: as numbers of slots, on the device, made once for each shape."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .message import say

BASE = "__base__"
"""The name of no tenant: PEFT's word for a row of the base model."""

_KEPT = 16
_SERIAL = itertools.count()


@dataclass(eq=False)
class Route:
    """Tenants of the rows of a call; one name stands for all rows.

    Attributes:
        names: of each row of the batch, or of the batch.
        slots: likewise; -1 for the base.
        planes: bits of each tenant's weights; 0 for the base.
        serial: tells two routes apart, for whatever is recorded with one of them.
    """

    names: tuple[str, ...]
    slots: tuple[int, ...]
    planes: tuple[int, ...]
    serial: int = field(default_factory=lambda: next(_SERIAL))
    _made: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict)

    @property
    def distinct(self) -> tuple[int, ...]:
        """Slots that occur, without the base."""
        return tuple(sorted({slot for slot in self.slots if slot >= 0}))

    def planes_of(self, rows: int, device: torch.device) -> tuple[Tensor, ...]:
        """For each plane the slot of each row, `[rows]`, int32; -1 where a row has no such plane.

        Args:
            rows: of an input, tokens of one row of the batch next to each other.
            device: where the numbers are needed.
        """
        return self._numbers(rows, device)[1:]

    def index(self, rows: int, device: torch.device) -> Tensor:
        """The slot of each row, `[rows]`, int64; -1 for the base."""
        return self._numbers(rows, device)[0]

    def address(self, rows: int, device: torch.device) -> tuple[int, ...]:
        """Where the numbers for an input of so many rows lie: what was recorded reads them there."""
        return tuple(x.data_ptr() for x in self._numbers(rows, device))

    def check(self, rows: int) -> None:
        """Refuse a batch that the names do not fit."""
        if rows % len(self.names):
            got = f"{rows} rows for {len(self.names)} names"
            raise ValueError(say("adapter_names", "a name for each row of the batch", got, "Pass as many names as rows"))

    def _numbers(self, rows: int, device: torch.device) -> tuple[Tensor, ...]:
        """The index of the rows, and their slots plane by plane."""
        key = rows, device
        if key not in self._made:
            self.check(rows)
            if len(self._made) >= _KEPT:
                del self._made[next(iter(self._made))]
            planes = [[s if n > p else -1 for s, n in zip(self.slots, self.planes, strict=True)] for p in range(max(self.planes))]
            with torch.inference_mode(False):  # they outlive the call that first needs them
                each = torch.tensor([list(self.slots), *planes]).repeat_interleave(rows // len(self.slots), 1)
                index, *others = each.to(device)
                self._made[key] = (index, *(slots.int() for slots in others))
        return self._made[key]
