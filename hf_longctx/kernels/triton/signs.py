"""What kernels of one-bit deltas do: split rows into whole numbers of 8 bits, sort rows by slot, unpack signs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import on

DIGITS = 4
"""Of base 256 in which an input is written: a whole number below 2^30, of which the row's largest has 30 bits."""
WIDTH = 8192
"""Inputs of a row that are read at a time."""
SOME = 1024
"""Rows that are compared at a time."""
MOST_COMPARED = 8192
"""Rows each of which is compared with all others, in one launch; more are sorted by torch."""


@triton.jit
def expand(words, N: tl.constexpr, W: tl.constexpr):
    """Bits of words `[N, W]` as int8, `[N, 32 W]`: each word's in the order 0, 8, 16, 24, 1, 9, and so on.

    So four neighbours are the bytes of a shifted word, and nothing but a shift and an `and` is computed for them.
    """
    four = (words[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 0x01010101
    even = tl.join(four.to(tl.int8), (four >> 16).to(tl.int8))
    return tl.reshape(tl.join(even, tl.join((four >> 8).to(tl.int8), (four >> 24).to(tl.int8))), (N, W * 32))


@triton.jit
def place(slots, order, rows, PLANES: tl.constexpr, SOME: tl.constexpr):
    """Write this program's row where it comes among all, sorted by their slots."""
    row, some, before = tl.program_id(0), tl.arange(0, SOME), tl.zeros((SOME,), tl.int32)
    for start in range(0, rows, SOME):
        other = start + some
        there = other < rows
        first = other < row
        for plane in tl.static_range(PLANES):
            mine = tl.load(slots + row * PLANES + (PLANES - 1 - plane))
            slot = tl.load(slots + other * PLANES + (PLANES - 1 - plane), mask=there, other=0)
            first = (slot < mine) | ((slot == mine) & first)
        before += (first & there).to(tl.int32)
    tl.store(order + tl.sum(before, 0), row)


@triton.jit(do_not_specialize=["rows"])
def _prepare(
    x, x_r, slots, digits, units, sums, order, rows, inputs, each,
    PLANES: tl.constexpr, SOME: tl.constexpr, WIDE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A row's digits and sums of them, what one is worth, and the row's place among those sorted by slot."""
    row, groups = tl.program_id(0), inputs // each
    x += row.to(tl.int64) * x_r
    span, largest = tl.arange(0, WIDE), tl.zeros((WIDE,), tl.float32)
    broken = tl.zeros((WIDE,), tl.int32)
    for start in range(0, inputs, WIDE):
        size = tl.abs(tl.load(x + start + span, mask=start + span < inputs, other=0.0).to(tl.float32))
        broken |= (size < float("inf")).to(tl.int32) ^ 1  # NaN is not
        largest = tl.maximum(largest, size)
    finite = tl.max(broken, 0) == 0
    exponent = tl.max(largest, 0).to(tl.int32, bitcast=True) >> 23
    power = tl.where(finite, tl.minimum(156 - exponent, 126), 0)
    factor = ((power + 127) << 23).to(tl.float32, bitcast=True)
    unit = ((127 - power) << 23).to(tl.float32, bitcast=True)
    tl.store(units + row, tl.where(finite, unit, float("nan")))

    at = tl.arange(0, SPAN)
    inside = at // 32 * 32 + at % 4 * 8 + at // 4 % 8  # as `expand` has it
    digits += row.to(tl.int64) * (4 * inputs)
    for group in range(groups):
        total = tl.zeros((SPAN,), tl.int64)
        for start in range(group * each, (group + 1) * each, SPAN):
            there = start + at < (group + 1) * each
            wide = tl.load(x + start + inside, mask=there, other=0.0).to(tl.float32)
            left = tl.where(finite, wide * factor, 0.0).to(tl.int32)
            total += left
            to = digits + start + at
            for _ in tl.static_range(4):
                digit = ((left + 128) & 255) - 128
                tl.store(to, digit.to(tl.int8), mask=there)
                left = (left - digit) >> 8
                to += inputs
        tl.store(sums + row.to(tl.int64) * groups + group, tl.sum(total, 0))
    place(slots, order, rows, PLANES, SOME)


@triton.jit(do_not_specialize=["rows"])
def _sort(slots, order, rows, PLANES: tl.constexpr, SOME: tl.constexpr):
    place(slots, order, rows, PLANES, SOME)


class Rows(NamedTuple):
    """Rows as products with signs take them.

    Args:
        digits: `[R, 4, K]`, int8, the least first, in the order of `expand`.
        units: `[R]`, float32: `x = unit * sum of 256^i digit_i`, cut to whole units; NaN where x is not finite.
        sums: `[R, groups]`, int64, of such numbers.
        order: `[R]`, int32: rows sorted by their slots.
    """

    digits: Tensor
    units: Tensor
    sums: Tensor
    order: Tensor


def prepared(x: Tensor, slots: Tensor, groups: int) -> Rows:
    """Rows `[R, K]` whose channels lie side by side, and their slots `[R, P]`, contiguous; groups of inputs."""
    (rows, inputs), each = x.shape, x.shape[1] // groups
    made = Rows(
        x.new_empty(rows, DIGITS, inputs, dtype=torch.int8),
        x.new_empty(rows, dtype=torch.float32),
        x.new_empty(rows, groups, dtype=torch.int64),
        slots.new_empty(rows),
    )
    with on(x.device):
        _prepare[(rows,)](
            x,
            x.stride(0),
            slots,
            *made,
            rows,
            inputs,
            each,
            PLANES=slots.shape[1],
            SOME=min(SOME, triton.next_power_of_2(rows)),
            WIDE=min(WIDTH, triton.next_power_of_2(inputs)),
            SPAN=min(WIDTH, triton.next_power_of_2(each)),
            num_warps=4 if inputs <= 1024 else 8 if inputs <= 4096 else 16,
        )
    return made


def sorted_rows(slots: Tensor) -> Tensor:
    """Rows sorted by their slots, `[R]`, int32; slots: `[R, P]`, contiguous."""
    order, rows = slots.new_empty(len(slots)), len(slots)
    if rows > MOST_COMPARED:
        order = torch.arange(rows, device=slots.device)
        for plane in slots.unbind(1)[::-1]:
            order = order[plane[order].argsort(stable=True)]
        return order.int()
    with on(slots.device):
        _sort[(rows,)](slots, order, rows, PLANES=slots.shape[1], SOME=min(SOME, triton.next_power_of_2(rows)))
    return order
