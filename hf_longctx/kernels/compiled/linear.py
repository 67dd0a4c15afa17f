"""Quantized linears (`linear.py`) in the compiled library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Implementation
from ..linear import PackedWeight, Tokens
from . import library

MOST_CHANNELS = 32768
MOST_OF_ONE = 16384
"""Channels of a row up to which the launch of the product makes 8 bits of it."""
FEW, FEW_OF_SEVERAL = 1, 16
"""Tokens up to which the time on CUDA is that of reading the weight; or, of several weights, that of their launches."""
LARGE = 8192
"""Rows of a weight that is read for longer than a launch takes, so that several of them need not be one."""


class HflQuantize(ctypes.Structure):
    """`hfl_quantize`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("tokens", "columns", "dtype", "kind")),
        *((name, ctypes.c_void_p) for name in ("x", "y")),
        *((name, ctypes.c_int64) for name in ("x_row", "y_row")),
        *((name, ctypes.c_int32) for name in ("weight_dtype", "early")),
        *((name, ctypes.c_float) for name in ("eps", "offset")),
        *((name, ctypes.c_void_p) for name in ("weight", "normed", "values", "scale", "sums", "stream")),
    )


class HflLinear(ctypes.Structure):
    """`hfl_linear`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("tokens", "rows", "columns", "bits", "group", "dtype", "few", "ahead")),
        *((name, ctypes.c_void_p) for name in ("values", "token_scale", "sums", "codes", "scale", "shift", "groups")),
        *((name, ctypes.c_void_p) for name in ("bias", "out", "scratch", "stream", "next", "of")),
    )


def _reject_rows(x: Tensor) -> str | None:
    reason = library.reason(x.device)
    if reason is not None:
        return reason
    if x.ndim != 2 or not x.numel():
        return "takes two axes, none of them empty"
    if torch.is_grad_enabled() and x.requires_grad:
        return "computes no gradients"
    if x.dtype not in library.DTYPES or (x.is_cuda and x.dtype == torch.float32):
        return "takes float16 or bfloat16, on the CPU float32 too"
    if x.stride(1) != 1:
        return "needs channels that lie side by side"
    if x.is_cuda and (x.shape[1] % 8 or x.shape[1] > MOST_CHANNELS or not library.aligned(x)):
        return f"takes a multiple of 8 channels, at most {MOST_CHANNELS}, in rows that begin at multiples of 16 bytes"
    return None


def _reject_norm(x: Tensor, weight: Tensor, eps: float, offset: float, early: bool) -> str | None:
    if not x.is_cuda:
        return library.reason_on_cuda(x)
    if weight.device != x.device or weight.dtype != x.dtype or not weight.is_contiguous():
        return "needs rows and weight on one device, in one dtype"
    if torch.is_grad_enabled() and weight.requires_grad:
        return "computes no gradients"
    if not library.aligned(weight):
        return "needs a weight that begins at a multiple of 16 bytes"
    return _reject_rows(x)


def _reject_gated(gate: Tensor, up: Tensor) -> str | None:
    if not gate.is_cuda:
        return library.reason_on_cuda(gate)
    if up.device != gate.device or up.dtype != gate.dtype or up.shape != gate.shape:
        return "needs both on one device, in one dtype and shape"
    return _reject_rows(gate) or _reject_rows(up)


def _quantized(block: HflQuantize, x: Tensor) -> Tokens:
    """Run with what the block says beside rows x."""
    rows, columns = x.shape
    values = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    sums = torch.empty(rows, dtype=torch.int32, device=x.device)
    block.tokens, block.columns, block.dtype = rows, columns, library.DTYPES[x.dtype]
    block.x, block.x_row = x.data_ptr(), x.stride(0)
    block.values, block.scale, block.sums = values.data_ptr(), scale.data_ptr(), sums.data_ptr()
    library.run("quantize", block, x.device)
    return Tokens(values, scale, sums)


def quantize_tokens(x: Tensor) -> Tokens:
    """`linear.quantize_tokens`."""
    return _quantized(HflQuantize(kind=0), x)


def quantize_norm(x: Tensor, weight: Tensor, eps: float, offset: float, early: bool) -> tuple[Tensor, Tokens]:
    """`linear.quantize_norm`."""
    dtype, normed = library.DTYPES[weight.dtype], torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = HflQuantize(kind=1, weight_dtype=dtype, early=early, eps=eps, offset=offset, weight=weight.data_ptr())
    block.normed = normed.data_ptr()
    return normed, _quantized(block, x)


def quantize_gated(gate: Tensor, up: Tensor) -> Tokens:
    """`linear.quantize_gated`."""
    return _quantized(HflQuantize(kind=2, y=up.data_ptr(), y_row=up.stride(0)), gate)


def reject_linear(tokens: Tokens, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """Why the library does not take these arguments, or None."""
    values = tokens.values
    reason = library.reason(values.device)
    if reason is not None:
        return reason
    parts = [tokens.scale, tokens.sums, weight.codes, weight.scale, weight.shift, weight.groups, bias]
    if any(x is not None and x.device != values.device for x in parts):
        return "needs tokens and weight on one device"
    if any(x is not None and not x.is_contiguous() for x in [values, *parts]):
        return "needs contiguous tensors"
    if not values.numel():
        return "takes no empty tensors"
    if dtype not in library.DTYPES or (values.is_cuda and dtype == torch.float32):
        return "gives float16 or bfloat16, on the CPU float32 too"
    if bias is not None and bias.dtype != torch.float32:
        return "needs a bias in float32"
    if values.is_cuda and not all(library.aligned(x) for x in (values, weight.codes)):
        return "needs tensors that begin at multiples of 16 bytes"
    return None


def _is_known(weight: PackedWeight) -> bool:
    """True if the weight was read before and has not been written to since, so that no kernel can still do so."""
    known = True
    for x in (weight.codes, weight.groups, weight.scale, weight.shift):
        if x is None:
            continue
        if x.is_inference():  # nobody counts how often it is written to
            return False
        base: Any = x if x._base is None else x._base  # a layer makes views, each call anew
        now = x.data_ptr(), x._version
        known = known and getattr(base, "_hfl_read", None) == now
        base._hfl_read = now
    return known


def reject_linears(
    tokens: Tokens, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], dtype: torch.dtype
) -> str | None:
    """Why the library does not take these arguments, or None."""
    reasons = (reject_linear(tokens, w, bias, dtype) for w, bias in zip(weights, biases, strict=True))
    return next((reason for reason in reasons if reason is not None), None)


def w4a8_linear(tokens: Tokens, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`linear.w4a8_linear`."""
    return w4a8_linears(tokens, [weight], [bias], dtype)[0]


def w4a8_linears(
    tokens: Tokens, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Tensor]:
    """`linear.w4a8_linears`."""
    device = tokens.values.device
    outs = [torch.empty(len(tokens.values), len(w.scale), dtype=dtype, device=device) for w in weights]
    few = FEW if len(weights) == 1 or min(len(w.scale) for w in weights) >= LARGE else FEW_OF_SEVERAL
    blocks = [_block(tokens, *each, few) for each in zip(weights, biases, outs, strict=True)]
    if device.type != "cuda":
        for block in blocks:
            library.run("linear", block, device)
        return outs
    for block, after in pairwise(blocks):
        block.next = ctypes.addressof(after)
    with torch.cuda.device(device):
        count = library.library().hfl_linear_scratch(ctypes.byref(blocks[0]))
    known = [_is_known(weight) for weight in weights]  # each is noted, whatever the others are
    # Zeros that are made while a graph is captured are a launch of their own, before which nothing begins early. Few
    # tokens go on having them: codes that come early keep the kernel that makes the tokens waiting for its own reads.
    zeros = library.counters(device, count) if count or len(tokens.values) <= few else None
    scratch, ahead = library.pointer(zeros), all(known)
    for block in blocks:
        block.scratch, block.ahead, block.stream = scratch, ahead, library.stream(device)
    library.run("linear", blocks[0], device)
    return outs


def reject_linears_of(
    x: Tensor, up: Tensor | None, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]
) -> str | None:
    """Why the library does not take these arguments, or None."""
    reason = _reject_rows(x) if up is None else _reject_gated(x, up)
    if reason is not None:
        return reason
    nothing = x.new_empty(0, dtype=torch.int8)
    like = Tokens(x.new_empty(1, dtype=torch.int8), nothing, nothing)
    return reject_linears(like, weights, biases, x.dtype)


def w4a8_linears_of(
    x: Tensor, up: Tensor | None, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """`linear.w4a8_linears_of`: one launch for one row, else two."""
    if not is_one(x):
        tokens = quantize_tokens(x) if up is None else quantize_gated(x, up)
        return w4a8_linears(tokens, weights, biases, x.dtype)
    of = HflQuantize(1, x.shape[1], library.DTYPES[x.dtype], 0 if up is None else 2)
    of.x, of.x_row, of.y, of.y_row = x.data_ptr(), x.stride(0), library.pointer(up), 0
    outs = [x.new_empty(1, len(w.scale)) for w in weights]
    blocks = [_block(None, *each, FEW) for each in zip(weights, biases, outs, strict=True)]
    for block, after in pairwise(blocks):
        block.next = ctypes.addressof(after)
    known = [_is_known(weight) for weight in weights]
    for block in blocks:  # of which three are one launch
        block.of, block.ahead, block.stream = ctypes.addressof(of), all(known), library.stream(x.device)
    library.run("linear", blocks[0], x.device)
    return outs


def is_one(x: Tensor) -> bool:
    """True if the launch of the product makes 8 bits of x."""
    one = x.is_cuda and len(x) == 1 and x.shape[1] <= MOST_OF_ONE
    return one and torch.cuda.get_device_capability(x.device)[0] >= 9


def _block(tokens: Tokens | None, weight: PackedWeight, bias: Tensor | None, out: Tensor, few: int) -> HflLinear:
    (rows, columns), group = weight.shape, weight.group or 0
    block = HflLinear(len(out), rows, columns, weight.bits, group, library.DTYPES[out.dtype], few)
    if tokens is not None:
        block.values, block.token_scale = tokens.values.data_ptr(), tokens.scale.data_ptr()
        block.sums = tokens.sums.data_ptr()
    block.codes, block.scale = weight.codes.data_ptr(), weight.scale.data_ptr()
    block.shift, block.groups = library.pointer(weight.shift), library.pointer(weight.groups)
    block.bias, block.out = library.pointer(bias), out.data_ptr()
    return block


OPS = {
    "quantize_tokens": Implementation(quantize_tokens, _reject_rows),
    "quantize_norm": Implementation(quantize_norm, _reject_norm),
    "quantize_gated": Implementation(quantize_gated, _reject_gated),
    "w4a8_linear": Implementation(w4a8_linear, reject_linear),
    "w4a8_linears": Implementation(w4a8_linears, reject_linears),
    "w4a8_linears_of": Implementation(w4a8_linears_of, reject_linears_of),
}
