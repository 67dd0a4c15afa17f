"""Numbers that are only moved, several at a time: between layouts torch copies one after the other."""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = torch.complex128
"""A dtype of 16 bytes."""


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same memory in pieces of 16 bytes, for what moves them; as they are on a CPU, or where rows are no pieces."""
    return tuple(x.view(_PIECE) for x in tensors) if all(map(_in_pieces, tensors)) else tensors


def picked(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """`x.index_select(axis, index)`; not along the last axis."""
    (wide,) = widened(x)
    out = wide.index_select(axis, index)
    return out if wide is x else out.view(x.dtype)  # a view in a dtype has no gradient, not even in its own


def _in_pieces(x: Tensor) -> bool:
    """True if channels lie side by side and rows begin at multiples of 16 bytes."""
    size = x.itemsize
    if not x.is_cuda or x.requires_grad or x.stride(-1) != 1 or x.data_ptr() % 16:
        return False
    return all(n * size % 16 == 0 for n in (x.shape[-1], *x.stride()[:-1]))
