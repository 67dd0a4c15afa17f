"""Arguments of `delta_linear`, and what it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """Sizes; by_row: a scale for each output."""

    rows: int
    inputs: int
    outputs: int
    slots: int
    groups: int
    planes: int = 1
    by_row: bool = False


def make(case: Case, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> tuple[Tensor, ...]:
    """x, base_out, bits, scales and slots; without planes, one for each row. Some rows have none."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(case.rows, case.inputs, generator=made).to(dtype)
    base = torch.randn(case.rows, case.outputs, generator=made).to(dtype)
    words = (case.slots, case.outputs, case.inputs // 32)
    bits = torch.randint(-(2**31), 2**31, words, generator=made).int()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scales = torch.rand(case.slots, case.outputs if case.by_row else 1, case.groups, generator=made).to(wide) + 0.5
    slots = torch.randint(-1, case.slots, (case.rows, case.planes), generator=made).int()
    slots = slots[:, 0] if case.planes == 1 else slots
    return tuple(tensor.to(device) for tensor in (x, base, bits, scales, slots))


def literal(x: Tensor, base: Tensor, bits: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    """A loop over rows and planes, in float64; signs are read one by one."""

    @cache
    def weights(slot: int) -> Tensor:
        signs = [[1.0 if word & 1 << b else -1.0 for word in words for b in range(32)] for words in bits[slot].tolist()]
        spread = scales[slot].double().repeat_interleave(x.shape[1] // scales.shape[2], 1)
        return torch.tensor(signs, dtype=torch.float64) * spread

    rows = []
    for row, of_row in enumerate(slots.view(len(slots), -1).tolist()):
        out = base[row].double()
        for slot in of_row:
            if slot >= 0:
                out = out + weights(slot) @ x[row].double()
        rows.append(out)
    return torch.stack(rows)
