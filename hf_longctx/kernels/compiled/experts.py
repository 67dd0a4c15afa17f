"""Quantized weights of experts (`experts.py`) in the compiled library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..dispatch import Implementation
from ..experts import PackedExperts, Sorted
from ..linear import Tokens
from ..reference.experts import one_by_one, taken
from . import library
from .linear import reject_linear, w4a8_linear

MOST, MOST_SORTED = 512, 4096
"""Experts; rows that are sorted in one launch."""


class HflSort(ctypes.Structure):
    """`hfl_sort`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "experts")),
        *((name, ctypes.c_void_p) for name in ("ids", "order", "places", "ends", "stream")),
    )


class HflExperts(ctypes.Structure):
    """`hfl_experts`."""

    __slots__ = ()
    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("tokens", "rows", "columns", "bits", "group", "dtype", "experts", "times", "most")
        ),
        *((name, ctypes.c_void_p) for name in ("values", "token_scale", "sums", "order", "ends")),
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "shift", "groups", "out", "stream")),
    )


class HflCombine(ctypes.Structure):
    """`hfl_combine`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("tokens", "top", "columns", "experts", "dtype", "weight_dtype")),
        *((name, ctypes.c_void_p) for name in ("rows", "places", "ends", "weights", "out", "stream")),
    )


def _reject_sort(ids: Tensor, experts: int) -> str | None:
    reason = library.reason_on_cuda(ids)
    if reason is not None:
        return reason
    if ids.ndim != 1 or ids.dtype != torch.int64 or not ids.is_contiguous() or not len(ids):
        return "takes numbers of experts in int64, side by side"
    if len(ids) > MOST_SORTED or not 0 < experts <= MOST:
        return f"takes at most {MOST_SORTED} rows and {MOST} experts"
    return None


def sort_experts(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`experts.sort_experts`."""
    order, places = (torch.empty(len(ids), dtype=torch.int32, device=ids.device) for _ in range(2))
    ends = torch.empty(experts, dtype=torch.int32, device=ids.device)
    block = HflSort(len(ids), experts, ids.data_ptr(), order.data_ptr(), places.data_ptr(), ends.data_ptr())
    library.run("sort", block, ids.device)
    return order, places, ends


def _reject_experts(tokens: Tokens, weight: PackedExperts, by: Sorted, times: int, dtype: torch.dtype) -> str | None:
    reason = reject_linear(tokens, weight.of(0), None, dtype)
    if reason is not None:
        return reason
    if any(x.device != tokens.values.device or x.dtype != torch.int32 for x in (by.order, by.ends)):
        return "needs the order of rows where they are, in int32"
    if any(x is not None and not x.is_contiguous() for x in (weight.codes, weight.scale, weight.shift, weight.groups)):
        return "needs contiguous tensors"
    if tokens.values.is_cuda and weight.scale.shape[0] > MOST:
        return f"takes at most {MOST} experts"
    return None


def w4a8_experts(tokens: Tokens, weight: PackedExperts, by: Sorted, times: int, dtype: torch.dtype) -> Tensor:
    """`experts.w4a8_experts`."""
    device, count = tokens.values.device, len(by.order)
    if device.type == "cpu":  # where a loop costs nothing
        return one_by_one(w4a8_linear, tokens, weight, by, times, dtype)
    out = torch.empty(count, weight.scale.shape[1], dtype=dtype, device=device)
    experts, rows = weight.scale.shape
    block = HflExperts(count, rows, weight.columns, weight.bits, weight.group or 0, library.DTYPES[dtype], experts)
    block.times, block.most = times, -(-count // times) if times else count
    block.codes, block.scale = weight.codes.data_ptr(), weight.scale.data_ptr()
    block.shift, block.groups = library.pointer(weight.shift), library.pointer(weight.groups)
    block.order, block.ends, block.out = by.order.data_ptr(), by.ends.data_ptr(), out.data_ptr()
    if times:
        with torch.cuda.device(device):
            if library.library().hfl_experts_in_order(ctypes.byref(block)):
                tokens, block.times = taken(tokens, by, times), 0
    block.values, block.token_scale = tokens.values.data_ptr(), tokens.scale.data_ptr()
    block.sums = tokens.sums.data_ptr()
    library.run("experts", block, device)
    return out


def _reject_combine(rows: Tensor, by: Sorted, weights: Tensor) -> str | None:
    reason = library.reason_on_cuda(rows)
    if reason is not None:
        return reason
    if any(x.device != rows.device for x in (by.places, by.ends, weights)):
        return "needs all on one device"
    if torch.is_grad_enabled() and (rows.requires_grad or weights.requires_grad):
        return "computes no gradients"
    if rows.dtype not in (torch.float16, torch.bfloat16) or weights.dtype not in library.DTYPES:
        return "takes rows in float16 or bfloat16"
    if not rows.numel() or rows.shape[1] % 8 or not library.aligned(rows):
        return "takes a multiple of 8 channels, in rows that begin at multiples of 16 bytes"
    if not all(x.is_contiguous() for x in (rows, by.places, weights)):
        return "needs contiguous tensors"
    return None


def combine_experts(rows: Tensor, by: Sorted, weights: Tensor) -> Tensor:
    """`experts.combine_experts`."""
    tokens, top = weights.shape
    out = torch.empty(tokens, rows.shape[1], dtype=rows.dtype, device=rows.device)
    dtypes = library.DTYPES[rows.dtype], library.DTYPES[weights.dtype]
    block = HflCombine(tokens, top, rows.shape[1], len(by.ends), *dtypes, rows.data_ptr(), by.places.data_ptr())
    block.ends, block.weights, block.out = by.ends.data_ptr(), weights.data_ptr(), out.data_ptr()
    library.run("combine", block, rows.device)
    return out


OPS = {
    "sort_experts": Implementation(sort_experts, _reject_sort),
    "w4a8_experts": Implementation(w4a8_experts, _reject_experts),
    "combine_experts": Implementation(combine_experts, _reject_combine),
}
