"""The norm of a row."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, early: bool, of_row: Tensor | None = None) -> Tensor:
    """The definition of `ops.rms_norm`."""
    rows = x.float()
    unit = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + eps)
    if of_row is not None:
        weight = weight[of_row].reshape(len(x), *(1,) * (x.ndim - 2), -1)
    scale = weight.float() + offset
    if not early:
        return (unit * scale).to(x.dtype)
    return (unit.to(x.dtype).float() * scale).to(torch.promote_types(x.dtype, weight.dtype))
