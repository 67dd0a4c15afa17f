"""`delta.delta_linear` in the compiled library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import Implementation
from . import library

BLOCK = 128
"""Inputs of which a CUDA device reads a multiple."""

HALF_BLOCK = 64
"""The same where weights and deltas are merged."""

MOST_INPUTS, MOST_SLOTS, MOST_PARTS = 1 << 16, 1 << 12, 3


class HflDelta(ctypes.Structure):
    """`hfl_delta`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "inputs", "outputs", "slots", "planes", "groups", "scale_rows")),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("x", "base")),
        *((name, ctypes.c_int64) for name in ("x_r", "base_r")),
        *((name, ctypes.c_void_p) for name in ("bits", "scales", "slots_of_rows", "out", "scratch", "stream")),
    )


class HflMerged(ctypes.Structure):
    """`hfl_merged`."""

    __slots__ = ()
    _fields_ = (
        ("delta", HflDelta),
        ("weight", ctypes.c_void_p),
        ("weight_r", ctypes.c_int64),
        ("bias", ctypes.c_void_p),
    )


class HflJoinedPart(ctypes.Structure):
    """`hfl_joined_part`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("outputs", "scale_rows")),
        *((name, ctypes.c_void_p) for name in ("bits", "scales", "weight")),
        ("weight_r", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("bias", "out")),
    )


class HflJoined(ctypes.Structure):
    """`hfl_joined`."""

    __slots__ = ()
    _fields_ = (("first", HflMerged), ("parts", ctypes.c_int32), ("others", HflJoinedPart * (MOST_PARTS - 1)))


def reject(x: Tensor, base_out: Tensor, bits: Tensor, scales: Tensor, slots: Tensor) -> str | None:
    """Why the library does not take these arguments, or None."""
    reason = library.reason(x.device)
    if reason is not None:
        return reason
    if any(other.device != x.device for other in (base_out, bits, scales, slots)):
        return "needs all tensors on one device"
    if base_out.dtype != x.dtype or x.dtype not in library.DTYPES or (x.is_cuda and x.dtype == torch.float32):
        return f"needs x and base_out in float16 or bfloat16{'' if x.is_cuda else ', or float32'}"
    if 0 in (*x.shape, *base_out.shape, *bits.shape, *slots.shape):
        return "takes no empty tensors"
    if not bits.is_contiguous() or not scales.is_contiguous():
        return "needs bits and scales that are contiguous"
    return _reject_on_cuda(x, bits, scales) if x.is_cuda else None


def _reject_on_cuda(x: Tensor, bits: Tensor, scales: Tensor) -> str | None:
    if x.shape[1] % (BLOCK * scales.shape[2]):
        return f"takes inputs, and groups of them, that are a multiple of {BLOCK}"
    if x.shape[1] > MOST_INPUTS or len(bits) > MOST_SLOTS:
        return f"takes at most {MOST_INPUTS} inputs and {MOST_SLOTS} slots"
    return None if bits.data_ptr() % 16 == 0 else "needs bits that begin at a multiple of 16 bytes"


def reject_merged(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, scales: Tensor, slots: Tensor
) -> str | None:
    """Why the library does not take these arguments of `linear_with_delta`, or None."""
    reason = library.reason_on_cuda(x, "is for CUDA: elsewhere there is nothing to gain")
    if reason is not None:
        return reason
    if torch.cuda.get_device_capability(x.device) != (9, 0) or "sm_90a" not in library.about():
        return "is for devices of sm_90"
    inputs = [tensor for tensor in (weight, bias, bits, scales, slots) if tensor is not None]
    if any(other.device != x.device for other in inputs):
        return "needs all tensors on one device"
    if x.dtype not in (torch.float16, torch.bfloat16) or {t.dtype for t in (weight, bias) if t is not None} != {
        x.dtype
    }:
        return "needs x, weight and bias in float16 or bfloat16"
    if 0 in (*x.shape, *weight.shape, *bits.shape, *slots.shape) or len(weight) % 2:
        return "takes an even number of outputs, and no empty tensors"
    if x.shape[1] % (HALF_BLOCK * scales.shape[2]) or len(bits) > MOST_SLOTS:
        return f"takes inputs, and groups of them, that are a multiple of {HALF_BLOCK}, and at most {MOST_SLOTS} slots"
    if not bits.is_contiguous() or not scales.is_contiguous() or bits.data_ptr() % 16:
        return "needs bits and scales that are contiguous, and bits that begin at a multiple of 16 bytes"
    return None


def reject_joined(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bits: Sequence[Tensor],
    scales: Sequence[Tensor],
    slots: Tensor,
) -> str | None:
    """Why the library does not take these layers of many rows of one input, or None."""
    if not 1 <= len(weights) <= MOST_PARTS:
        return f"takes 1 to {MOST_PARTS} layers"
    if any(len(own) != len(bits[0]) for own in bits) or any(own.shape[2] != scales[0].shape[2] for own in scales):
        return "needs as many slots, and groups of inputs, in all layers"
    each = (reject_merged(x, *layer, slots) for layer in zip(weights, biases, bits, scales, strict=True))
    return next((reason for reason in each if reason is not None), None)


def delta_linear(x: Tensor, base_out: Tensor, bits: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    """`delta.delta_linear`; slots: `[R, P]`."""
    x, slots = library.laid_out(x), slots.contiguous()
    base = base_out if base_out.stride(1) == 1 else base_out.contiguous()
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    block = HflDelta(*x.shape, base.shape[1], len(bits), slots.shape[1], scales.shape[2], scales.shape[1])
    block.dtype = library.DTYPES[x.dtype]
    block.x, block.x_r, block.base, block.base_r = x.data_ptr(), x.stride(0), base.data_ptr(), base.stride(0)
    block.bits, block.scales, block.slots_of_rows = bits.data_ptr(), scales.data_ptr(), slots.data_ptr()
    block.out = out.data_ptr()
    if x.is_cuda:
        size = library.library().hfl_delta_scratch(ctypes.byref(block))
        scratch = torch.empty(size, dtype=torch.uint8, device=x.device)
        block.scratch = scratch.data_ptr()
    library.run("delta", block, x.device)
    return out


def linear_with_delta(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, scales: Tensor, slots: Tensor
) -> Tensor:
    """`delta.linear_with_delta`; slots: `[R, P]`."""
    return linears_with_delta(x, (weight,), (bias,), (bits,), (scales,), slots)[0]


def linears_with_delta(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bits: Sequence[Tensor],
    scales: Sequence[Tensor],
    slots: Tensor,
) -> tuple[Tensor, ...]:
    """`delta.joined` of many rows; slots: `[R, P]`."""
    x, slots, weights = library.laid_out(x), slots.contiguous(), [library.laid_out(own) for own in weights]
    biases = [None if own is None else own.contiguous() for own in biases]
    outs = tuple(x.new_empty(len(x), len(own)) for own in weights)
    first, planes, groups = weights[0], slots.shape[1], scales[0].shape[2]
    one = HflDelta(*x.shape, len(first), len(bits[0]), planes, groups, scales[0].shape[1])
    block = HflJoined(HflMerged(one, first.data_ptr(), first.stride(0), library.pointer(biases[0])), len(weights))
    task = block.first.delta
    task.dtype, task.x, task.x_r = library.DTYPES[x.dtype], x.data_ptr(), x.stride(0)
    task.bits, task.scales, task.slots_of_rows = bits[0].data_ptr(), scales[0].data_ptr(), slots.data_ptr()
    task.out = outs[0].data_ptr()
    for i in range(1, len(weights)):
        own = weights[i]
        block.others[i - 1] = HflJoinedPart(
            *(len(own), scales[i].shape[1], bits[i].data_ptr(), scales[i].data_ptr()),
            *(own.data_ptr(), own.stride(0), library.pointer(biases[i]), outs[i].data_ptr()),
        )
    size = library.library().hfl_merged_scratch(ctypes.byref(block.first))
    scratch = torch.empty(size, dtype=torch.uint8, device=x.device)
    task.scratch = scratch.data_ptr()
    with torch.cuda.device(x.device):
        task.stream = library.stream(x.device)
        library.call("hfl_joined_cuda", block)
    return outs


OPS = {
    "delta_linear": Implementation(delta_linear, reject),
    "linear_with_delta": Implementation(linear_with_delta, reject_merged),
}
