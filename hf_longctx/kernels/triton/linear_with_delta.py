"""`delta.linear_with_delta` of many rows in Triton: one product with weights to which signs are added as they are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import on
from .signs import sorted_rows

FEW = 256
"""Rows from which on it pays: it reads weights as often as there are tiles of rows."""
MOST_PLANES = 4


@triton.jit
def _added(merged, signs, scale, word, W: tl.constexpr, N: tl.constexpr):
    """Weights plus the delta of a slot; scale: `[N]`."""
    words = tl.load(signs + word)
    minus = ((words ^ -1)[:, :, None] << (31 - tl.arange(0, 32))[None, None, :]) & -2147483648
    bits = tl.reshape(minus, (N, W * 32)) ^ scale.to(tl.int32, bitcast=True)[:, None]
    return merged + bits.to(tl.float32, bitcast=True)


@triton.jit
def _scale(scales, slot, near, group, kinds, scale_n, scale_s):
    """Of a slot `[N]`: of none 0, of one that is not there NaN."""
    found = tl.load(scales + tl.minimum(tl.maximum(slot, 0), kinds - 1) * scale_s + near * scale_n + group)
    return tl.where(slot < 0, 0.0, tl.where(slot < kinds, found, float("nan")))


@triton.jit(do_not_specialize=["rows", "outputs", "kinds", "scale_n", "scale_s"])
def _kernel(
    x, x_r, weight, weight_r, bias, bits, scales, slots, order, out,
    rows, words, outputs, kinds, each, scale_n, scale_s,
    PLANES: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr,
    GROUPED: tl.constexpr,
):  # fmt: skip
    """Some outputs of some rows, sorted by their slots: of those with the same after each other."""
    n, places = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, ROWS)
    start = tl.program_id(0) * ROWS
    count = tl.minimum(rows - start, ROWS)
    row = tl.load(order + start + tl.minimum(places, count - 1)).to(tl.int64)
    near = tl.minimum(n, outputs - 1).to(tl.int64)
    k, w = tl.arange(0, W * 32), tl.arange(0, W)
    inner = x + row[:, None] * x_r + k[None, :]
    own = weight + near[:, None] * weight_r + k[None, :]
    total = tl.zeros((N,), tl.float32)
    if bias is not None:
        total += tl.load(bias + near).to(tl.float32)
    here = bits + near[:, None] * words + w[None, :]
    done = 0
    while done < count:
        first = tl.load(order + start + done).to(tl.int64) * PLANES
        same = (places >= done) & (places < count)
        for plane in tl.static_range(PLANES):
            same &= tl.load(slots + row * PLANES + plane) == tl.load(slots + first + plane)
        slot0 = tl.load(slots + first).to(tl.int64)
        signs0 = here + tl.minimum(tl.maximum(slot0, 0), kinds - 1) * outputs * words
        scale0 = _scale(scales, slot0, near, 0, kinds, scale_n, scale_s)
        product = tl.zeros((N, ROWS), tl.float32)
        for word in tl.range(0, words, W, num_stages=STAGES):
            some = tl.load(inner + word * 32)
            merged = tl.load(own + word * 32).to(tl.float32)
            if GROUPED:
                scale0 = _scale(scales, slot0, near, word // each, kinds, scale_n, scale_s)
            merged = _added(merged, signs0, scale0, word, W, N)
            for plane in tl.static_range(1, PLANES):
                slot = tl.load(slots + first + plane).to(tl.int64)
                signs = here + tl.minimum(tl.maximum(slot, 0), kinds - 1) * outputs * words
                scale = _scale(scales, slot, near, word // each, kinds, scale_n, scale_s)
                merged = _added(merged, signs, scale, word, W, N)
            product = tl.dot(merged.to(some.dtype), tl.trans(some), product, input_precision="ieee")
        product += total[:, None]
        there = same[None, :] & (n < outputs)[:, None]
        tl.store(out + row[None, :] * outputs + near[:, None], product.to(out.dtype.element_ty), mask=there)
        done += tl.sum(same.to(tl.int32), 0)


def reject(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, scales: Tensor, slots: Tensor
) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    others = [one for one in (weight, bias, bits, scales, slots) if one is not None]
    if 0 in (*x.shape, *weight.shape, *bits.shape, *slots.shape):
        return "takes no empty tensors"
    if any(one.device != x.device for one in others):
        return "needs all tensors on one device"
    if x.dtype not in (torch.float16, torch.bfloat16) or any(
        one.dtype != x.dtype for one in (weight, bias) if one is not None
    ):
        return "needs x, weight and bias in float16 or bfloat16"
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        return "has no bfloat16 in Triton's interpreter, which gets it wrong"
    if not bits.is_contiguous() or not scales.is_contiguous():
        return "needs bits and scales that are contiguous"
    if len(x) < FEW:
        return f"leaves less than {FEW} rows to delta_linear"
    return f"takes at most {MOST_PLANES} planes" if slots.shape[1] > MOST_PLANES else None


def tile_of(words: int) -> tuple[int, int, int, dict[str, int]]:
    """Rows, outputs and words of a tile, and how it is compiled; words: of a group of inputs."""
    return 128, 128, min(2, words & -words), {"num_warps": 8, "STAGES": 3}


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, scales: Tensor, slots: Tensor
) -> Tensor:
    """`delta.linear_with_delta`; slots: `[R, P]`."""
    x, weight = (one if one.stride(1) == 1 else one.contiguous() for one in (x.detach(), weight.detach()))
    slots, bias = slots.contiguous(), None if bias is None else bias.detach().contiguous()
    (rows, inputs), outputs, groups = x.shape, len(weight), scales.shape[2]
    out, order, words = x.new_empty(rows, outputs), sorted_rows(slots), inputs // 32
    tile, some, most, options = tile_of(words // groups)
    with on(x.device):
        _kernel[(triton.cdiv(rows, tile), triton.cdiv(outputs, some))](
            x,
            x.stride(0),
            weight,
            weight.stride(0),
            bias,
            bits,
            scales,
            slots,
            order,
            out,
            rows,
            words,
            outputs,
            len(bits),
            words // groups,
            groups if scales.shape[1] > 1 else 0,
            groups * scales.shape[1],
            PLANES=slots.shape[1],
            ROWS=tile,
            N=some,
            W=most,
            GROUPED=groups > 1,
            **options,
        )
    return out
