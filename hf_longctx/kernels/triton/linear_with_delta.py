"""`delta.linear_with_delta` in Triton: of many rows one product with weights that meet their signs as they are read."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from ..delta import MANY
from . import delta_linear
from .arguments import on
from .signs import sorted_rows

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
    shift = tl.zeros((N,), tl.float32)
    if bias is not None:
        shift += tl.load(bias + near).to(tl.float32)
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
        product += shift[:, None]
        there = same[None, :] & (n < outputs)[:, None]
        tl.store(out + row[None, :] * outputs + near[:, None], product.to(out.dtype.element_ty), mask=there)
        done += tl.sum(same.to(tl.int32), 0)


def reject(x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, scales: Tensor, slots: Tensor) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    own = [one for one in (weight, bias) if one is not None]
    if any(one.device != x.device for one in own):
        return "needs all tensors on one device"
    if any(one.dtype != x.dtype for one in own):
        return "needs x, weight and bias in one dtype"
    return delta_linear.reject(x, x.new_empty(1, 1).expand(len(x), len(weight)), bits, scales, slots)


def merges(x: Tensor, slots: Tensor) -> bool:
    """Whether it does with one product."""
    return len(x) >= MANY and x.dtype != torch.float32 and slots.shape[1] <= MOST_PLANES


def tile_of(words: int) -> tuple[int, int, int, dict[str, int]]:
    """Rows, outputs and words of a tile, and how it is compiled; words: of a group of inputs."""
    return 256, 128, min(2, words & -words), {"num_warps": 8, "STAGES": 3}


def run(x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    """`delta.linear_with_delta`; slots: `[R, P]`. Of a few rows, and in float32, what torch and `delta_linear` do."""
    if not merges(x, slots):
        return delta_linear.run(x, linear(x, weight, bias), bits, scales, slots)
    return merged(delta_linear.beside(x), weight, bias, bits, scales, slots, sorted_rows(slots.contiguous()))


def merged(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, scales: Tensor, slots: Tensor, order: Tensor
) -> Tensor:
    """One product of each row with the weight and its deltas; order: rows sorted by their slots."""
    weight, slots = delta_linear.beside(weight), slots.contiguous()
    (rows, inputs), outputs, groups = x.shape, len(weight), scales.shape[2]
    out, words = x.new_empty(rows, outputs), inputs // 32
    tile, some, most, options = tile_of(words // groups)
    with on(x.device):
        _kernel[(triton.cdiv(rows, tile), triton.cdiv(outputs, some))](
            x,
            x.stride(0),
            weight,
            weight.stride(0),
            None if bias is None else bias.detach().contiguous(),
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
