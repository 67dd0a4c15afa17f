"""`ops.rms_norm` and `ops.gated` in the compiled library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..dispatch import Implementation
from . import library

MOST_CHANNELS = 16384


class HflNorm(ctypes.Structure):
    """`hfl_norm`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("outer", "middle", "inner", "dim", "dtype")),
        *((name, ctypes.c_int32) for name in ("weight_dtype", "early", "weights", "each")),
        *((name, ctypes.c_float) for name in ("eps", "offset")),
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("x_o", "x_m", "x_i")),
        ("weight", ctypes.c_void_p),
        ("weight_r", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("of_row", "out", "stream")),
    )


class HflGated(ctypes.Structure):
    """`hfl_gated`."""

    __slots__ = ()
    _fields_ = (
        ("count", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("gate", "up", "out", "stream")),
    )


def reject(
    x: Tensor, weight: Tensor, eps: float, offset: float, early: bool, of_row: Tensor | None = None
) -> str | None:
    """Why the library does not take these arguments, or None."""
    reason = library.reason_on_cuda(x)
    if reason is not None:
        return reason
    if not 1 <= x.ndim <= 4 or not x.numel():
        return "takes 1 to 4 axes, none of them empty"
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return "computes no gradients"
    if weight.device != x.device:
        return "needs rows and weight on one device"
    dtypes = {x.dtype, weight.dtype}
    if not dtypes <= library.DTYPES.keys() or (len(dtypes) > 1 and torch.float32 not in dtypes):
        return "needs rows and weight in one dtype, float32, float16 or bfloat16, or one of them in float32"
    if x.shape[-1] % 8 or x.shape[-1] > MOST_CHANNELS:
        return f"takes a multiple of 8 channels, at most {MOST_CHANNELS}"
    if not library.aligned(x) or not library.aligned(weight) or {x.stride(-1), weight.stride(-1)} != {1}:
        return "needs channels that lie side by side, and rows that begin at multiples of 16 bytes"
    if of_row is None:
        return None
    if x.ndim < 2 or weight.ndim != 2 or of_row.shape != x.shape[:1] or not of_row.is_contiguous():
        return "needs weights [W, D], and one number for each row along the first of several axes"
    if of_row.device != x.device or of_row.dtype != torch.int64:
        return "needs the numbers of weights as int64, on the device of x"
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, early: bool, of_row: Tensor | None = None) -> Tensor:
    """`ops.rms_norm`."""
    kind, of_weight, more = x.dtype, weight.dtype, 4 - x.ndim
    dtype = torch.promote_types(kind, of_weight) if early and kind != of_weight else kind
    out = torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
    dims, steps = (1,) * more + x.shape, (0,) * more + x.stride()  # quicker than a view
    block = HflNorm(*dims, library.DTYPES[kind], library.DTYPES[of_weight], early, eps=eps, offset=offset)
    block.x, (block.x_o, block.x_m, block.x_i) = x.data_ptr(), steps[:3]
    block.weight, block.out = weight.data_ptr(), out.data_ptr()
    if of_row is not None:
        block.weights, block.each, block.weight_r = len(weight), x.shape[1:-1].numel(), weight.stride(0)
        block.of_row = of_row.data_ptr()
    library.run("norm", block, x.device)
    return out


def reject_gated(gate: Tensor, up: Tensor) -> str | None:
    """Why the library does not take these arguments, or None."""
    reason = library.reason_on_cuda(gate)
    if reason is not None:
        return reason
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return "computes no gradients"
    if up.device != gate.device or up.shape != gate.shape:
        return "needs both tensors on one device and of one shape"
    if up.dtype != gate.dtype or gate.dtype not in (torch.float16, torch.bfloat16):
        return "needs both tensors in one dtype, float16 or bfloat16"
    if not gate.numel() or gate.numel() % 8:
        return "takes a multiple of 8 numbers"
    if not all(x.is_contiguous() and x.data_ptr() % 16 == 0 for x in (gate, up)):
        return "needs numbers that lie side by side, from a multiple of 16 bytes on"
    return None


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`ops.gated`."""
    out = torch.empty_like(gate)
    block = HflGated(gate.numel(), library.DTYPES[gate.dtype], gate.data_ptr(), up.data_ptr(), out.data_ptr())
    library.run("gated", block, gate.device)
    return out


OPS = {"rms_norm": Implementation(rms_norm, reject), "gated": Implementation(gated, reject_gated)}
