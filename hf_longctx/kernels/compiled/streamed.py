"""`delta.linears_with_delta` in the compiled library: layers that get the same rows."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import Implementation
from . import delta, library

MOST_ROWS, MOST_PARTS = 16, 3

_BLOCK, _MOST_WORDS = 128, (1 << 31) - 1
"""Inputs of which it takes a multiple; words of a slot's bits."""

_PARTS = ctypes.c_void_p * MOST_PARTS
_SIZES = ctypes.c_int32 * MOST_PARTS
_STRIDES = ctypes.c_int64 * MOST_PARTS


class HflStreamed(ctypes.Structure):
    """`hfl_streamed`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "inputs", "slots", "dtype", "parts")),
        ("outputs", _SIZES),
        ("x", ctypes.c_void_p),
        ("x_r", ctypes.c_int64),
        ("slots_of_rows", ctypes.c_void_p),
        ("weight", _PARTS),
        ("weight_r", _STRIDES),
        *((name, _PARTS) for name in ("bias", "bits", "scales", "out")),
        ("stream", ctypes.c_void_p),
    )


def reject(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bits: Sequence[Tensor],
    scales: Sequence[Tensor],
    slots: Tensor,
) -> str | None:
    """Why the library does not take these layers of one input, or None; slots: `[R, P]`."""
    if len(x) > MOST_ROWS:
        return delta.reject_joined(x, weights, biases, bits, scales, slots)
    reason = library.reason_on_cuda(x, "is for CUDA: elsewhere there is nothing to gain")
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(x.device) != (9, 0) or "sm_90a" not in library.about():
        return "is for devices of sm_90"
    values = [x, *weights, *(bias for bias in biases if bias is not None)]
    if any(other.device != x.device for other in (*values, *bits, *scales, slots)):
        return "needs all tensors on one device"
    if x.dtype not in (torch.float16, torch.bfloat16) or any(other.dtype != x.dtype for other in values):
        return "needs x, weights and biases in float16 or bfloat16"
    if torch.is_grad_enabled() and any(other.requires_grad for other in (*values, *scales)):
        return "computes no gradients"
    return _reject_sizes(x, weights, scales, slots) or _reject_places(biases, bits, scales, slots)


def _reject_sizes(x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], slots: Tensor) -> str | None:
    if not len(x) or not 1 <= len(weights) <= MOST_PARTS or any(not len(own) for own in weights):
        return f"takes at least one row and 1 to {MOST_PARTS} layers, none of them empty"
    if slots.shape[1] != 1 or any(own.shape[1:] != (1, 1) or not len(own) for own in scales):
        return "takes one slot for each row, and one scale for each slot"
    if x.shape[1] % _BLOCK or not x.shape[1]:
        return f"takes a multiple of {_BLOCK} inputs"
    most = max(len(own) for own in weights) * x.shape[1] // 32
    return f"takes at most {_MOST_WORDS} words of bits in a slot" if most > _MOST_WORDS else None


def _reject_places(
    biases: Sequence[Tensor | None], bits: Sequence[Tensor], scales: Sequence[Tensor], slots: Tensor
) -> str | None:
    if any(len(own) != len(bits[0]) for own in bits):
        return "needs as many slots in all layers"
    if any(not own.is_contiguous() or own.data_ptr() % 16 for own in bits):
        return "needs bits that are contiguous and begin at a multiple of 16 bytes"
    others = (*scales, slots, *(bias for bias in biases if bias is not None))
    return None if all(own.is_contiguous() for own in others) else "needs scales, slots and biases that are contiguous"


def linears_with_delta(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bits: Sequence[Tensor],
    scales: Sequence[Tensor],
    slots: Tensor,
) -> tuple[Tensor, ...]:
    """`delta.linears_with_delta`; slots: `[R, 1]` of few rows, `[R, P]` of many."""
    if len(x) > MOST_ROWS:
        return delta.linears_with_delta(x, weights, biases, bits, scales, slots)
    x, weights = library.laid_out(x), [library.laid_out(own) for own in weights]
    out = tuple(x.new_empty(len(x), len(own)) for own in weights)
    block = HflStreamed(*x.shape, len(bits[0]), library.DTYPES[x.dtype], len(weights))
    block.outputs = _SIZES(*(len(own) for own in weights))
    block.x, block.x_r, block.slots_of_rows = x.data_ptr(), x.stride(0), slots.data_ptr()
    block.weight, block.weight_r = (
        _PARTS(*(own.data_ptr() for own in weights)),
        _STRIDES(*(w.stride(0) for w in weights)),
    )
    block.bias = _PARTS(*(library.pointer(own) for own in biases))
    block.bits, block.scales = _PARTS(*(b.data_ptr() for b in bits)), _PARTS(*(own.data_ptr() for own in scales))
    block.out = _PARTS(*(own.data_ptr() for own in out))
    library.run("streamed", block, x.device)
    return out


OPS = {"linears_with_delta": Implementation(linears_with_delta, reject)}
