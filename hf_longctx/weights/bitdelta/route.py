"""Which row of a batch belongs to which tenant: as numbers of slots, on the device, made once for each shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .message import say

BASE = "__base__"
"""The name of no tenant: PEFT's word for a row of the base model."""

_KEPT = 16


@dataclass(eq=False)
class Route:
    """Tenants of the rows of a call; one name stands for all rows.

    Attributes:
        names: of each row of the batch, or of the batch.
        slots: likewise; -1 for the base.
        planes: bits of each tenant's weights; 0 for the base.
    """

    names: tuple[str, ...]
    slots: tuple[int, ...]
    planes: tuple[int, ...]
    known: dict[Any, Any] = field(default_factory=dict)
    """What hooks remember of it."""
    _made: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    @property
    def distinct(self) -> tuple[int, ...]:
        """Slots that occur, without the base."""
        return tuple(sorted({slot for slot in self.slots if slot >= 0}))

    def slots_of(self, rows: int, own: tuple[int, ...], apart: int, width: int, device: torch.device) -> Tensor:
        """The places of each row's planes where a slot has `apart` of them, `[rows, width]`, int32; -1 for none.

        Args:
            rows: of an input, tokens of one row of the batch next to each other.
            own: how many planes each name has.
            apart: planes that a slot has room for.
            width: most of them that are asked for.
            device: where the numbers are needed.
        """
        key = rows, own, apart, width, device
        if key not in self._made:
            places = [
                [slot * apart + plane if plane < planes else -1 for plane in range(width)]
                for slot, planes in zip(self.slots, own, strict=True)
            ]
            self._made[key] = self._spread(places, rows, torch.int32, device)
        return self._made[key]

    def those(self, rows: int, chosen: tuple[bool, ...], device: torch.device) -> Tensor:
        """Whether the name of each row is one of the chosen, `[rows]`, bool."""
        key = rows, chosen, device
        if key not in self._made:
            self._made[key] = self._spread(list(chosen), rows, torch.bool, device)
        return self._made[key]

    def index(self, rows: int, device: torch.device, base: int = -1) -> Tensor:
        """The slot of each row, `[rows]`, int64, counted from this number for the base."""
        key = rows, device, base
        if key not in self._made:
            self._made[key] = self._spread([slot + 1 + base for slot in self.slots], rows, torch.int64, device)
        return self._made[key]

    def buffers(self, rows: int) -> list[Tensor]:
        """What was made for inputs of so many rows."""
        return [x for key, x in self._made.items() if key[0] == rows]

    def check(self, rows: int) -> None:
        """Refuse a batch that the names do not fit."""
        if rows % len(self.names):
            got = f"{rows} rows for {len(self.names)} names"
            raise ValueError(
                say("adapter_names", "a name for each row of the batch", got, "Pass as many names as rows")
            )

    def _spread(self, each: list[Any], rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What each name has, repeated for its rows: beams of a row, and tokens, are next to each other."""
        self.check(rows)
        if len(self._made) >= _KEPT:
            del self._made[max(self._made, key=lambda key: key[0])]  # those of decode steps, which are recorded, stay
        with torch.inference_mode(False):  # it outlives the call that first needs it
            return torch.tensor(each, dtype=dtype).repeat_interleave(rows // len(self.slots), 0).to(device)
