"""Queries, and the keys of chosen blocks, turned for attention at clamped distances: once as near, once as far ones.

Near ones all stand at the lap of the list's last query; a far key stands at position 0, and a query at the clamped
distance from it (`reference/weigh.py` turns likewise). Keys lie side by side then, as their list has them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Packed, Selection, Turns, Visibility
from .arguments import bits_of, lists_of, places_of, rows_of
from .tiles import NEVER, head_of, positions

ROWS = 32
"""That a program turns."""


@triton.jit
def span(see, batch, first, size, tokens, stored, GIVEN: tl.constexpr):
    """The first and the last position of a list's queries; NEVER and -1 where there are none."""
    low, high = NEVER, -1
    for begin in range(0, size, 512):
        i = begin + tl.arange(0, 512)
        pos = tl.where(i < size, positions(see, batch, first + i, tokens, stored, GIVEN), -1)
        low = tl.minimum(low, tl.min(tl.where(pos < 0, NEVER, pos), 0))
        high = tl.maximum(high, tl.max(pos, 0))
    return low, high


@triton.jit
def _some(head, rows, there, channels, inside, like, BITS: tl.constexpr):
    """These channels of rows of a KV head, in the dtype of `like`, zero where they are not there."""
    HALVES: tl.constexpr = 2 if BITS == 4 else 1
    mask = there[:, None] & inside[None, :]
    x = tl.load(head[0] + (rows * head[3])[:, None] + (channels // HALVES)[None, :], mask=mask, other=0)
    if BITS > 0:
        if BITS == 4:
            x = x >> (channels % 2 * 4).to(tl.uint8)[None, :] & 15
        scale = tl.load(head[1] + rows * head[4], mask=there, other=0.0).to(tl.float32)
        zero = tl.load(head[2] + rows * head[4], mask=there, other=0.0).to(tl.float32)
        x = ((x.to(tl.float32) - zero[:, None]) * scale[:, None]).to(like.dtype)
    return x


@triton.jit
def _put(to, a, b, first, second, delta, freq, there, inside):
    """Pairs of channels, turned by so many positions; where no row is there, or none is turned, less is done."""
    mask = there[:, None] & inside[None, :]
    if tl.max(there.to(tl.int32), 0) > 0:
        delta = tl.where(there, delta, 0)
        angle = delta.to(tl.float32)[:, None] * freq[None, :]
        cos, sin = angle * 0.0 + 1.0, angle * 0.0
        if tl.max(tl.abs(delta), 0) > 0:
            cos, sin = tl.cos(angle), tl.sin(angle)
        tl.store(to[:, None] + first[None, :], (a * cos - b * sin).to(to.dtype.element_ty), mask=mask)
        tl.store(to[:, None] + second[None, :], (b * cos + a * sin).to(to.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "stored", "size", "length", "lap", "offset", "clamp", "reach", "count"])
def _turn(
    x, near, far, see, lists, inv_freq, tokens, stored, size, length, lap, offset, clamp, reach, count, kv_heads,
    KEYS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
    BITS: tl.constexpr, INTERLEAVED: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    each, head, batch = tl.num_programs(0) // count, tl.program_id(1), tl.program_id(2)
    number = tl.program_id(0) // each
    low, high = span(see, batch, number * size, size, tokens, stored, GIVEN)
    i = tl.program_id(0) % each * ROWS + tl.arange(0, ROWS)
    if KEYS:
        mine = batch.to(tl.int64) * lists[2] + (head * lists[5] // kv_heads) * lists[3] + number * lists[4]
        place, block, chosen = i // lists[6], lists[6], lists[7]
        block_id = tl.load(lists[0] + mine + place, mask=place < chosen, other=-1)
        rows = tl.load(lists[1] + mine + place, mask=place < chosen, other=0).to(tl.int64) * block + i % block
        pos = block_id * block + i % block
        there = (block_id >= 0) & (rows < stored) & (pos <= high)
        near_there, far_there, further = there & (pos >= low - clamp), there & (pos < high - clamp) & (i < reach), 0
        to, elsewhere = number * length + i, number * reach + i
    else:
        rows = (number * size + i).to(tl.int64)
        pos = positions(see, batch, rows, tokens, stored, GIVEN)
        there = (i < size) & (rows < tokens)
        near_there, far_there, further = there, there, clamp
        to, elsewhere = rows, rows
    own, base = tl.maximum(pos - offset, 0) // lap, tl.maximum(high - offset, 0) // lap
    from_head, near_head, far_head = head_of(x, batch, head), head_of(near, batch, head), head_of(far, batch, head)
    near_to = near_head[0] + to.to(tl.int64) * near_head[3]
    far_to = far_head[0] + elsewhere.to(tl.int64) * far_head[3]
    like = tl.zeros((1,), near_to.dtype.element_ty)

    pairs = tl.arange(0, WIDTH)
    first, second = pairs, pairs + PAIRS
    if INTERLEAVED:
        first, second = pairs * 2, pairs * 2 + 1
    inside = pairs < PAIRS
    freq = tl.load(inv_freq + pairs, mask=inside, other=0.0)
    a = _some(from_head, rows, there, first, inside, like, BITS).to(tl.float32)
    b = _some(from_head, rows, there, second, inside, like, BITS).to(tl.float32)
    _put(near_to, a, b, first, second, (own - base) * lap, freq, near_there, inside)
    _put(far_to, a, b, first, second, own * lap - pos + further, freq, far_there, inside)
    if REST > 0:
        channels = 2 * PAIRS + tl.arange(0, REST)
        inside = channels < DIM
        x = _some(from_head, rows, there, channels, inside, like, BITS)
        tl.store(near_to[:, None] + channels[None, :], x, mask=near_there[:, None] & inside[None, :])
        tl.store(far_to[:, None] + channels[None, :], x, mask=far_there[:, None] & inside[None, :])


class Turned(NamedTuple):
    """What is turned; of keys only those that a query sees as near ones, or as far ones, are written.

    Args:
        q: `[B, Hq, T, D]`, near.
        far_q: likewise, far.
        k: `[B, Hkv, N * K * block, D]`, in the dtype of q.
        far_k: `[B, Hkv, N * reach, D]`.
        reach: the first keys of a list, which may be far.
    """

    q: Tensor
    far_q: Tensor
    k: Tensor
    far_k: Tensor
    reach: int


def turned(q: Tensor, k: Tensor | Packed, see: Visibility, turns: Turns, selection: Selection, size: int) -> Turned:
    """Of the arguments of `attend_mass`, with so many queries of a list; in the current device."""
    assert turns.inv_freq is not None
    assert turns.clamp is not None
    (rows, _, tokens, dim), (kv_heads, stored) = q.shape, k.shape[1:3]
    count, chosen = selection.ids.shape[2:]
    length = chosen * selection.block
    reach = length if selection.far is None else min(selection.far, chosen) * selection.block
    near, far = (torch.empty_like(q, memory_format=torch.contiguous_format) for _ in range(2))
    near_k, far_k = (q.new_empty(rows, kv_heads, count * n, dim) for n in (length, reach))
    lists, frequencies = lists_of(selection), turns.inv_freq.to(q.device, torch.float32).contiguous()
    numbers = (tokens, stored, size, length, turns.lap, turns.offset, turns.clamp, reach, count, kv_heads)
    pairs = len(frequencies)
    flags: dict[str, Any] = {
        "DIM": dim,
        "PAIRS": pairs,
        "WIDTH": triton.next_power_of_2(pairs),
        "REST": triton.next_power_of_2(dim - 2 * pairs) if dim > 2 * pairs else 0,
        "INTERLEAVED": turns.interleaved,
        "GIVEN": see.q_pos is not None,
        "ROWS": ROWS,
    }
    places = places_of(see, q.device)
    for x, to, far_to, keys, many in ((q, near, far, False, size), (k, near_k, far_k, True, length)):
        grid = (triton.cdiv(many, ROWS) * count, x.shape[1], rows)
        rest = (places, lists, frequencies, *numbers)
        _turn[grid](rows_of(x), rows_of(to), rows_of(far_to), *rest, KEYS=keys, BITS=bits_of(x), **flags)
    return Turned(near, far, near_k, far_k, reach)
