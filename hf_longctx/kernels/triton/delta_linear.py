"""`delta.delta_linear` in Triton: sums are of whole numbers and so exact, in any order and beside any other rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import DTYPES, on
from .signs import Rows, expand, prepared

MOST_INPUTS = 1 << 16
"""Whose digits have a sum of 31 bits."""
PIECE = 2048
"""Rows that are sorted at a time."""


@triton.jit(do_not_specialize=["rows", "outputs", "planes", "plane", "kinds", "groups", "scale_n", "scale_s"])
def _kernel(
    digits, units, sums, order, bits, scales, slots, base, base_r, out,
    rows, words, outputs, planes, plane, kinds, groups, each, scale_n, scale_s,
    ROWS: tl.constexpr, PARTS: tl.constexpr, N: tl.constexpr, W: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some outputs of some rows, sorted by slot: of every PARTS-th slot among theirs, one after the other."""
    part, start = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS * ROWS
    n, place = tl.program_id(1) * N + tl.arange(0, N), start + tl.arange(0, ROWS)
    valid = place < rows
    row = tl.load(order + place, mask=valid, other=0).to(tl.int64)
    slot = tl.minimum(tl.load(slots + row * planes + plane, mask=valid, other=-1), kinds)  # of all that are not there
    unit = tl.load(units + row)
    column, k, w = tl.arange(0, ROWS * 4), tl.arange(0, W * 32), tl.arange(0, W)
    own = tl.load(order + tl.minimum(start + column // 4, rows - 1)).to(tl.int64)
    inner = digits + (own * 4 + column % 4)[:, None] * (words * 32) + k[None, :]
    near = tl.minimum(n, outputs - 1).to(tl.int64)
    weights = 1 << (tl.arange(0, 4) * 8).to(tl.int64)
    total = tl.zeros((N, ROWS), tl.float32)
    mine = tl.where(slot < 0, part, 1) == 0
    last, number = tl.max(slot, 0), 0
    now = tl.min(tl.where(slot < 0, last, slot), 0)  # slots of a tile, in rising order
    while now <= last and now >= 0:
        if number % PARTS == part:
            here = tl.minimum(now, kinds - 1).to(tl.int64)
            signs = bits + (here * outputs + near)[:, None] * words + w[None, :]
            added = tl.zeros((N, ROWS), tl.float32)
            for group in range(groups):
                product = tl.zeros((N, ROWS * 4), tl.int32)
                for word in tl.range(group * each, (group + 1) * each, W, num_stages=STAGES):
                    some = tl.load(inner + word * 32)
                    ones = expand(tl.load(signs + word), N, W)
                    product = tl.dot(ones, tl.trans(some), product, out_dtype=tl.int32)
                exact = tl.sum(tl.reshape(product.to(tl.int64), (N, ROWS, 4)) * weights[None, None, :], 2)
                exact = (2 * exact - tl.load(sums + row * groups + group)[None, :]).to(tl.float32) * unit[None, :]
                scale = tl.load(scales + here * scale_s + near * scale_n + group)
                added = tl.fma(exact, scale[:, None] + tl.zeros((N, ROWS), tl.float32), added)
            total = tl.where((slot == now)[None, :], tl.where(now < kinds, added, float("nan")), total)
            mine |= slot == now
        number += 1
        now = tl.min(tl.where(slot > now, slot, 2147483647), 0)
    there = (mine & valid)[None, :] & (n < outputs)[:, None]
    total += tl.load(base + row[None, :] * base_r + near[:, None], mask=there, other=0.0).to(tl.float32)
    tl.store(out + row[None, :] * outputs + near[:, None], total.to(out.dtype.element_ty), mask=there)


def reject(x: Tensor, base_out: Tensor, bits: Tensor, scales: Tensor, slots: Tensor) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    if 0 in (*x.shape, *base_out.shape, *bits.shape, *slots.shape):
        return "takes no empty tensors"
    if any(other.device != x.device for other in (base_out, bits, scales, slots)):
        return "needs all tensors on one device"
    if x.dtype not in DTYPES or base_out.dtype not in DTYPES:
        return "needs x and base_out in float32, float16 or bfloat16"
    if torch.bfloat16 in (x.dtype, base_out.dtype) and not x.is_cuda:
        return "has no bfloat16 in Triton's interpreter, which gets it wrong"
    if not bits.is_contiguous() or not scales.is_contiguous():
        return "needs bits and scales that are contiguous"
    return f"takes at most {MOST_INPUTS} inputs" if x.shape[1] > MOST_INPUTS else None


def tile_of(rows: int, kinds: int, words: int) -> tuple[int, int, int, int, dict[str, int]]:
    """Rows of a tile, programs that share it, outputs, words, and how it is compiled; results are the same with any.

    Args:
        rows: of x.
        kinds: slots that there are: each may have a share of the rows.
        words: of a group of inputs.
    """
    each = min(max(2, triton.next_power_of_2(-(-2 * rows // kinds))), 16)
    if rows == 1:
        return each, 1, 32, min(16, words & -words), {"num_warps": 2, "STAGES": 4}
    parts, most = (2, 16) if each == 2 else (1, 8)
    return each, parts, 128, min(most, words & -words), {"num_warps": 4, "STAGES": 3}


def run(x: Tensor, base_out: Tensor, bits: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    """`delta.delta_linear`; slots: `[R, P]`."""
    return added(x, (base_out,), (bits,), (scales,), slots)[0]


def added(
    x: Tensor, bases: Sequence[Tensor], bits: Sequence[Tensor], scales: Sequence[Tensor], slots: Tensor
) -> tuple[Tensor, ...]:
    """`delta.delta_linear` of layers that get the same rows, whose digits are written once.

    Args:
        x: `[R, K]`.
        bases: what each base layer gives, `[R, N]`.
        bits: of each.
        scales: of each, with as many groups.
        slots: `[R, P]`.
    """
    x, bases = beside(x), [beside(base) for base in bases]
    outs = tuple(base.new_empty(base.shape) for base in bases)
    for first in range(0, len(x), PIECE):
        piece = slice(first, first + PIECE)
        some = slots[piece].contiguous()
        rows = prepared(x[piece], some, scales[0].shape[2])
        for base, own_bits, own_scales, out in zip(bases, bits, scales, outs, strict=True):
            _add(rows, some, base[piece], own_bits, own_scales, out[piece])
    return outs


def beside(x: Tensor) -> Tensor:
    """With channels that lie side by side."""
    return x.detach() if x.stride(1) == 1 else x.detach().contiguous()


def _add(rows: Rows, slots: Tensor, base: Tensor, bits: Tensor, scales: Tensor, out: Tensor) -> None:
    """The planes one after the other; between them results are not rounded."""
    (count, _, inputs), outputs, groups = rows.digits.shape, base.shape[1], scales.shape[2]
    words, planes = inputs // 32, slots.shape[1]
    tile, parts, some, most, options = tile_of(count, len(bits), words // groups)
    between = out if planes == 1 else out.new_empty(count, outputs, dtype=torch.float32)
    with on(out.device):
        for plane in range(planes):
            to = out if plane == planes - 1 else between
            _kernel[(triton.cdiv(count, tile) * parts, triton.cdiv(outputs, some))](
                *rows,
                bits,
                scales,
                slots,
                base,
                base.stride(0),
                to,
                count,
                words,
                outputs,
                planes,
                plane,
                len(bits),
                groups,
                words // groups,
                groups if scales.shape[1] > 1 else 0,
                groups * scales.shape[1],
                ROWS=tile,
                PARTS=parts,
                N=some,
                W=most,
                **options,
            )
            base = to
