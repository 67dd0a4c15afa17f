"""`tables.linear_of_rows` in the compiled library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import Implementation
from . import library

MOST_ROWS = 16

_UNIT, _MOST_INPUTS = 64, 56256
"""Inputs of which it takes a multiple; how many."""

_NUMBERS = ctypes.c_int32 * MOST_ROWS
_TABLES = ctypes.c_void_p * MOST_ROWS


class HflTables(ctypes.Structure):
    """`hfl_tables`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "inputs", "width", "tables", "dtype")),
        *((name, _NUMBERS) for name in ("table_of_row", "outputs")),
        ("x", ctypes.c_void_p),
        ("x_r", ctypes.c_int64),
        *((name, _TABLES) for name in ("weight", "scales")),
        *((name, ctypes.c_void_p) for name in ("out", "stream")),
    )


def reject(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor | None], table_of_row: Sequence[int], width: int
) -> str | None:
    """Why the library does not take these arguments, or None."""
    reason = library.reason_on_cuda(x, "is for CUDA: elsewhere there is nothing to gain")
    if reason is not None:
        return reason
    others = [*weights, *(scale for scale in scales if scale is not None)]
    if any(other.device != x.device for other in others):
        return "needs all tensors on one device"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return "needs x in float16 or bfloat16"
    if torch.is_grad_enabled() and any(other.requires_grad for other in (x, *others)):
        return "computes no gradients"
    if not 1 <= len(x) <= MOST_ROWS or not 1 <= len(weights) <= MOST_ROWS or any(not len(own) for own in weights):
        return f"takes 1 to {MOST_ROWS} rows and matrices, none of them empty"
    if not 0 < x.shape[1] <= _MOST_INPUTS or x.shape[1] % _UNIT:
        return f"takes a multiple of {_UNIT} inputs, at most {_MOST_INPUTS}"
    if any(not own.is_contiguous() for own in others) or any(own.data_ptr() % 16 for own in weights):
        return "needs matrices that are contiguous and begin at a multiple of 16 bytes"
    return None


def linear_of_rows(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor | None], table_of_row: Sequence[int], width: int
) -> Tensor:
    """`tables.linear_of_rows`."""
    x = library.laid_out(x)
    out = x.new_empty(len(x), width)
    block = HflTables(*x.shape, width, len(weights), library.DTYPES[x.dtype])
    block.table_of_row, block.outputs = _NUMBERS(*table_of_row), _NUMBERS(*(len(own) for own in weights))
    block.x, block.x_r, block.out = x.data_ptr(), x.stride(0), out.data_ptr()
    block.weight = _TABLES(*(own.data_ptr() for own in weights))
    block.scales = _TABLES(*(library.pointer(own) for own in scales))
    library.run("tables", block, x.device)
    return out


OPS = {"linear_of_rows": Implementation(linear_of_rows, reject)}
