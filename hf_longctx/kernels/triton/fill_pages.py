"""`ops.fill_pages` in Triton: programs write some tokens of a row and KV head each; others then bound sub-blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..fill import GroupFill
from ..types import parts
from .append_pages import reject_any
from .arguments import bits_of, on, rows_of, width_of
from .rows import bound, extremes, write
from .tiles import head_of, read

ROWS = 16
"""Tokens that a program writes, or reads at a time."""


@triton.jit
def _write_kernel(
    k_store, v_store, k, v, read_k, read_v, heads, pos, pos_b, lasts, sink, ring, tokens,
    DIM: tl.constexpr, WIDTH: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, K_BITS: tl.constexpr,
    V_BITS: tl.constexpr, RING: tl.constexpr, READS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2)
    own = head if heads is None else tl.load(heads + head)
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    given = at < tokens
    place = tl.load(pos + batch * pos_b + at, mask=given, other=-1)
    there, slots = place >= 0, place
    if RING:
        last = tl.load(lasts + (batch if pos_b > 0 else 0))
        there = there & ((place < sink) | (place > last - ring))
        slots = tl.where(place < sink, place, sink + (place - sink) % ring)
    keys, values = head_of(k_store, batch, head), head_of(v_store, batch, head)
    fresh_k = k[0] + batch.to(tl.int64) * k[1] + own * k[2] + at * k[3]
    fresh_v = v[0] + batch.to(tl.int64) * v[1] + own * v[2] + at * v[3]
    some, others = write(keys, fresh_k, slots, given, there, DIM, WIDTH, K_BITS)
    if READS:
        to = read_k[0] + batch.to(tl.int64) * read_k[1] + own * read_k[2] + at * read_k[3]
        _hand_out(to, some, others, given, DIM, WIDTH, K_BITS)
    some, others = write(values, fresh_v, slots, given, there, V_DIM, V_WIDTH, V_BITS)
    if READS:
        to = read_v[0] + batch.to(tl.int64) * read_v[1] + own * read_v[2] + at * read_v[3]
        _hand_out(to, some, others, given, V_DIM, V_WIDTH, V_BITS)


@triton.jit
def _hand_out(rows, some, others, given, DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """What was stored to rows that begin at these addresses."""
    HALF: tl.constexpr = 2 if BITS == 4 else 1
    channels = tl.arange(0, WIDTH) * HALF
    to, there = rows[:, None] + channels[None, :], given[:, None] & (channels < DIM)[None, :]
    tl.store(to, some, mask=there)
    if BITS == 4:
        tl.store(to + 1, others, mask=there)


@triton.jit
def _bound_kernel(
    k_store, bounds, pos, pos_b, lasts, sub,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2)
    first, last = tl.load(pos + batch * pos_b), tl.load(lasts + (batch if pos_b > 0 else 0))
    entry = tl.maximum(first, 0) // sub + tl.program_id(0)
    if entry * sub <= last:
        keys, offsets = head_of(k_store, batch, head), tl.arange(0, ROWS)
        like = tl.zeros((1,), bounds[0].dtype.element_ty)
        nothing = tl.zeros((WIDTH,), tl.float32) + float("inf")
        least, largest, other_least, other_largest = nothing, -nothing, nothing, -nothing
        for row in range(0, sub, ROWS):
            there = (row + offsets < sub) & (entry * sub + row + offsets <= last)
            some, others = read(keys, entry * sub + row, offsets, there, like, DIM, WIDTH, BITS, True)
            low, high = extremes(some, there)
            least, largest = tl.minimum(least, low), tl.maximum(largest, high)
            if BITS == 4:
                low, high = extremes(others, there)
                other_least, other_largest = tl.minimum(other_least, low), tl.maximum(other_largest, high)
        to = bounds[0] + batch.to(tl.int64) * bounds[1] + head * bounds[2] + entry * (2 * DIM)
        bound(to, least, largest, DIM, WIDTH, 2 if BITS == 4 else 1)
        if BITS == 4:
            bound(to + 1, other_least, other_largest, DIM, WIDTH, 2)


def reject(
    groups: Sequence[GroupFill],
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    first: int | None,
    read: Sequence[Tensor],
    blank: bool,
) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    if any(x.dtype != k.dtype or x.device != k.device or x.stride(3) != 1 for x in read):
        return "needs what is read in the dtype of the tokens, beside them, and its channels side by side"
    found = (reject_any(group.k, group.v, k, v, pos, group.ring, group.bounds) for group in groups)
    return next(filter(None, found), None)


def run(
    groups: Sequence[GroupFill],
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    first: int | None,
    read: Sequence[Tensor],
    blank: bool,
) -> None:
    """`ops.fill_pages`; where tokens stand is read on the device alone."""
    k, v = (x.detach() if x.stride(3) == 1 else x.detach().contiguous() for x in (k, v))
    pos, lasts = pos.contiguous(), pos.amax(1)
    apart = 0 if len(pos) == 1 else pos.shape[1]
    with on(k.device):
        for group in groups:
            if blank:
                _clear(group, 0 if first is None or group.ring is not None else k.shape[2])
            _fill(group, k, v, (pos, apart, lasts), read)


def _clear(group: GroupFill, written: int) -> None:
    """Of each head all but the first slots, which are written; and bounds."""
    for tensor in (*parts(group.k), *parts(group.v)):
        tensor[:, :, written:].zero_()
    if group.bounds is not None:
        group.bounds[:, :, :, 0], group.bounds[:, :, :, 1] = float("inf"), float("-inf")


def _fill(group: GroupFill, k: Tensor, v: Tensor, at: tuple[Any, ...], read: Sequence[Tensor]) -> None:
    tokens, sizes = k.shape[2], {"DIM": k.shape[3], "WIDTH": width_of(k.shape[3], bits_of(group.k)), "ROWS": ROWS}
    heads = (group.k.shape[1], k.shape[0])
    _write_kernel[(-(-tokens // ROWS), *heads)](
        rows_of(group.k),
        rows_of(group.v),
        *((x, *x.stride()[:3]) for x in (k, v, *(read or (k, v)))),
        group.heads,
        *at,
        group.sink,
        group.ring or 1,
        tokens,
        V_DIM=v.shape[3],
        V_WIDTH=width_of(v.shape[3], bits_of(group.v)),
        K_BITS=bits_of(group.k),
        V_BITS=bits_of(group.v),
        RING=group.ring is not None,
        READS=bool(read),
        **sizes,
    )
    if group.bounds is None:
        return
    bounds = (group.bounds, *group.bounds.stride()[:2])
    entries = tokens // group.sub + 2
    _bound_kernel[(entries, *heads)](rows_of(group.k), bounds, *at, group.sub, BITS=bits_of(group.k), **sizes)
