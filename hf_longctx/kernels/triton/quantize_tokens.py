"""`linear.quantize_tokens` in Triton: one program for a row, which it reads twice; norms and gates are torch's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu

from ..linear import Tokens
from ..reference.norm import rms_norm
from .arguments import on, reject_dtypes
from .rows import nearest

MOST_CHANNELS = 1 << 16
WIDTH = 4096
"""Channels that are read at a time."""
LEAST = 2.0**-100
"""A row of smaller values counts as zero."""


@triton.jit
def _kernel(x, x_r, values, scales, sums, channels, LEAST: tl.constexpr, WIDTH: tl.constexpr):
    row, some = tl.program_id(0), tl.arange(0, WIDTH)
    x += row.to(tl.int64) * x_r
    values += row.to(tl.int64) * channels
    largest, broken = tl.zeros((WIDTH,), tl.float32), tl.zeros((WIDTH,), tl.int32)
    for start in range(0, channels, WIDTH):
        size = tl.abs(tl.load(x + start + some, mask=start + some < channels, other=0.0).to(tl.float32))
        broken |= (size < float("inf")).to(tl.int32) ^ 1  # NaN is not
        largest = tl.maximum(largest, size)
    most, finite = tl.max(largest, 0), tl.max(broken, 0) == 0
    small = (most < LEAST) | (finite == 0)
    up = tl.where(small, 0.0, tl.div_rn(127.0, tl.where(small, 1.0, most)))
    tl.store(scales + row, tl.where(finite, tl.div_rn(most, 127.0), float("nan")))
    total = tl.zeros((WIDTH,), tl.int32)
    for start in range(0, channels, WIDTH):
        there = start + some < channels
        wide = tl.load(x + start + some, mask=there, other=0.0).to(tl.float32)
        wide = nearest(tl.where(finite, wide, 0.0) * up)
        value = tl.minimum(tl.maximum(wide, -127.0), 127.0).to(tl.int32)
        tl.store(values + start + some, value.to(tl.int8), mask=there)
        total += value
    tl.store(sums + row, tl.sum(total, 0))


def reject(x: Tensor) -> str | None:
    """Why the kernel does not take these rows, or None."""
    if x.ndim != 2 or not x.numel():
        return "takes two axes, none of them empty"
    if torch.is_grad_enabled() and x.requires_grad:
        return "computes no gradients"
    if x.shape[1] > MOST_CHANNELS:
        return f"takes at most {MOST_CHANNELS} channels"
    return reject_dtypes("rows", x)


def run(x: Tensor) -> Tokens:
    """`linear.quantize_tokens`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, channels = x.shape
    made = Tokens(
        x.new_empty(rows, channels, dtype=torch.int8),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, dtype=torch.int32),
    )
    with on(x.device):
        _kernel[(rows,)](
            x,
            x.stride(0),
            made.values,
            made.scale,
            made.sums,
            channels,
            LEAST=LEAST,
            WIDTH=min(WIDTH, triton.next_power_of_2(channels)),
            enable_fp_fusion=False,  # a product is rounded before it is rounded to a whole number
        )
    return made


def reject_norm(x: Tensor, weight: Tensor, eps: float, offset: float, early: bool) -> str | None:
    """Why the kernel does not take what a norm gives, or None."""
    if weight.device != x.device or weight.dtype != x.dtype:
        return "needs rows and weight on one device, in one dtype"
    if torch.is_grad_enabled() and weight.requires_grad:
        return "computes no gradients"
    return reject(x)


def run_norm(x: Tensor, weight: Tensor, eps: float, offset: float, early: bool) -> tuple[Tensor, Tokens]:
    """`linear.quantize_norm`."""
    normed = rms_norm(x, weight, eps, offset, early)
    return normed, run(normed)


def reject_gated(gate: Tensor, up: Tensor) -> str | None:
    """Why the kernel does not take what a gate lets through, or None."""
    if up.device != gate.device or up.dtype != gate.dtype or up.shape != gate.shape:
        return "needs both on one device, in one dtype and shape"
    return reject(up) or reject(gate)


def run_gated(gate: Tensor, up: Tensor) -> Tokens:
    """`linear.quantize_gated`."""
    return run(silu(gate) * up)
