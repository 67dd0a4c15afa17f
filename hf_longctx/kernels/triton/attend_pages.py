"""`ops.attend_pages` in Triton: few queries over many keys, which are shared out among programs and then merged.

Paper: FlashDecoding, arXiv 2311.01282, section 2. The query heads of a KV head, and the queries of a call, are the rows
of one tile, so that keys and values are read once; they may lie in pages of any size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.rotate import rotate
from ..reference.weigh import empty_out, positions
from ..types import Logits, Packed, Selection, Turns, Visibility
from .arguments import LEAST, arguments_of, bits_of, on, reject_tensors, width_of
from .tiles import (
    LISTS,
    LOG2_E,
    NEVER,
    PLACES,
    average,
    head_of,
    logits_of,
    nothing,
    products,
    put,
    queries,
    read,
)

MOST = 64
"""Queries of a row."""


@triton.jit
def _tiles(low, high, stored, see, lists, BN: tl.constexpr, MODE: tl.constexpr, WINDOWED: tl.constexpr):
    """How many tiles are read of sinks that the window is past, of all, and the first one in the window."""
    sinks, first = 0, 0
    if MODE == LISTS:
        return 0, tl.cdiv(lists[7] * lists[6], BN), 0
    if MODE == PLACES:
        return 0, tl.cdiv(stored, BN), 0
    last = tl.minimum(high + 1, stored)
    end = tl.cdiv(last, BN)
    if WINDOWED:
        first = tl.minimum(tl.maximum(low - see[5] + 1, 0) // BN, end)
        sinks = tl.minimum(tl.cdiv(tl.minimum(see[4], last), BN), first)
    return sinks, sinks + end - first, first


@triton.jit
def _place(i, sinks, first, mine, stored, see, lists, batch, offsets, BN: tl.constexpr, MODE: tl.constexpr):
    """Columns of a tile, which of them exist, and their positions."""
    if MODE == LISTS:
        token = i * BN + offsets
        number = token // lists[6]
        block = tl.load(lists[0] + mine + number, mask=number < lists[7], other=-1)
        page = tl.load(lists[1] + mine + number, mask=number < lists[7], other=0)
        within = token - number * lists[6]
        columns = page.to(tl.int64) * lists[6] + within
        return columns, (block >= 0) & (columns < stored), block * lists[6] + within
    columns = tl.where(i < sinks, i, first + i - sinks) * BN + offsets
    there, key_pos = columns < stored, columns
    if MODE == PLACES:
        key_pos = tl.load(see[2] + batch * see[3] + columns, mask=there, other=-1).to(tl.int32)
    return columns.to(tl.int64), there, key_pos


@triton.jit
def _part(
    q, k, v, out, see, lists, sink_logits, slopes, tokens, stored, scale, softcap,
    before, elsewhere, lap, offset, sums_of, stats_of, q_heads,
    GROUP: tl.constexpr, HEADS: tl.constexpr, OWN: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, BITS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, MODE: tl.constexpr, GIVEN: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SUNK: tl.constexpr, SLOPED: tl.constexpr, TURNED: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    split, splits, batch = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    units = q_heads // HEADS
    unit, own = tl.program_id(1) % units, tl.program_id(1) // units
    rows, offsets = tl.arange(0, BM), tl.arange(0, BN)
    if OWN:
        heads, at = rows, rows * 0 + own
    else:
        rows += own * BM
        heads, at = rows // tokens, rows % tokens
    valid = heads < HEADS
    heads += unit * HEADS
    kv_head = unit * HEADS // GROUP
    pos = tl.where(valid, stored - tokens + at, -1)
    if GIVEN:
        pos = tl.load(see[0] + batch * see[1] + at, mask=valid, other=-1).to(tl.int32)
    high, low = tl.max(pos, 0), tl.min(tl.where(pos < 0, NEVER, pos), 0)

    places = batch.to(tl.int64) * q[1] + heads * q[2] + at * q[3]
    asked = queries(q[0], places, valid, DIM, WIDTH, BITS)
    if TURNED:
        places = batch.to(tl.int64) * before[1] + heads * before[2] + at * before[3]
        asked_before = queries(before[0], places, valid, DIM, WIDTH, BITS)
        asked_elsewhere = queries(elsewhere[0], places, valid, DIM, WIDTH, BITS)
    keys, values = head_of(k, batch, kv_head), head_of(v, batch, kv_head)
    sums, others, top, total = nothing(BM, V_WIDTH, BITS)
    slope = tl.zeros((BM,), tl.float32)
    if SLOPED:
        slope += tl.load(slopes + heads, mask=valid, other=0.0)
    mine = 0
    if MODE == LISTS:
        mine = batch.to(tl.int64) * lists[2] + (unit * HEADS * lists[5] // q_heads) * lists[3]
        if OWN:
            mine += own * lists[4]
    sinks, count, first = _tiles(low, high, stored, see, lists, BN, MODE, WINDOWED)
    each = tl.cdiv(count, splits)
    begin = split * each

    for i in tl.range(begin, tl.minimum(begin + each, count), num_stages=STAGES):
        columns, there, key_pos = _place(i, sinks, first, mine, stored, see, lists, batch, offsets, BN, MODE)
        there &= (key_pos >= 0) & (key_pos <= high)
        key = read(keys, 0, columns, there, asked[0], DIM, WIDTH, BITS, True)
        value = read(values, 0, columns, there, asked[0], V_DIM, V_WIDTH, BITS, True)
        distance = key_pos[None, :] - pos[:, None]
        x = products(asked, key, BITS)
        if TURNED:
            earlier = (tl.maximum(pos - offset, 0) // lap)[:, None] > (tl.maximum(key_pos - offset, 0) // lap)[None, :]
            x = tl.where(earlier, products(asked_before, key, BITS), x)
            there_first = (key_pos < see[4])[None, :]
            x = tl.where(there_first, products(asked_elsewhere, key, BITS), x)
        x = logits_of(x, distance, scale, softcap, slope[:, None], CAPPED, SLOPED)
        visible = there[None, :] & (distance <= 0)
        if WINDOWED:
            visible &= (distance > -see[5]) | (key_pos < see[4])[None, :]
        x = tl.where(visible, x, float("-inf"))
        sums, others, top, total = average((sums, others, top, total), x, 1.0, value, BITS, False)

    if SPLIT:
        place = ((split * tl.num_programs(2) + batch) * q_heads + heads) * tokens + at
        tl.store(stats_of + place * 2, top, mask=valid)
        tl.store(stats_of + place * 2 + 1, total, mask=valid)
        put(sums_of, place.to(tl.int64) * V_DIM, valid, sums, others, V_DIM, V_WIDTH, BITS)
    else:
        share = 1.0 / tl.where(total == 0.0, 1.0, total)
        if SUNK:
            sink = tl.load(sink_logits + heads, mask=valid, other=0.0) * LOG2_E
            largest = tl.maximum(top, sink)
            share = tl.exp2(top - largest) / (total * tl.exp2(top - largest) + tl.exp2(sink - largest))
        others = others * share[:, None] if BITS == 4 else others
        place = batch.to(tl.int64) * out[1] + heads * out[2] + at * out[3]
        put(out[0], place, valid, sums * share[:, None], others, V_DIM, V_WIDTH, BITS)


@triton.jit
def merge(
    out, sums_of, stats_of, sink_logits, totals, splits, q_heads, tokens,
    SPLITS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, SUNK: tl.constexpr,
):  # fmt: skip
    """The parts of one query of one head; totals: where log2 of its sum of weights goes, +inf if it sees nothing."""
    at, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    split, channels = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    place = ((split * tl.num_programs(2) + batch) * q_heads + head) * tokens + at
    top = tl.load(stats_of + place * 2, mask=split < splits, other=float("-inf"))
    total = tl.load(stats_of + place * 2 + 1, mask=split < splits, other=0.0)
    largest = tl.max(top, 0)
    sink = float("-inf")
    if SUNK:
        sink = tl.load(sink_logits + head) * LOG2_E
        largest = tl.maximum(largest, sink)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    share = tl.exp2(top - largest)
    whole = tl.sum(total * share, 0)
    if SUNK:
        whole += tl.exp2(sink - largest)
    inside = (split < splits)[:, None] & (channels < DIM)[None, :]
    sums = tl.load(sums_of + place.to(tl.int64)[:, None] * DIM + channels[None, :], mask=inside, other=0.0)
    divisor = tl.where(whole == 0.0, 1.0, whole)
    if totals is not None:
        found = tl.where(tl.sum(total, 0) == 0.0, float("inf"), largest + tl.log2(divisor))
        tl.store(totals + (batch * q_heads + head) * tokens + at, found)
    result = tl.sum(sums * share[:, None], 0) / divisor
    to = out[0] + batch.to(tl.int64) * out[1] + head * out[2] + at * out[3] + channels
    tl.store(to, result.to(out[0].dtype.element_ty), mask=channels < DIM)


def reject(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    if q.shape[2] > MOST:
        return f"takes at most {MOST} queries a row"
    if turns is not None and turns.clamp is not None:
        return "cannot clamp distances"
    if turns is not None and logits.slopes is not None:
        return "has no ALiBi at lap positions"
    if selection is not None and selection.q_block > 1 and selection.ids.shape[2] > 1:
        return "takes a selection for each query, or one for all"
    if selection is not None and not selection.ids.numel():
        return "takes no empty lists"
    return reject_tensors(q, k, v, logits)


def run(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> Tensor:
    """`ops.attend_pages`."""
    q = q if q.stride(3) == 1 else q.contiguous()
    out = empty_out(q, v.shape[3])
    (batch, q_heads, tokens, dim), group = q.shape, q.shape[1] // k.shape[1]
    own = selection is not None and selection.ids.shape[2] > 1
    heads = 1 if selection is not None and selection.ids.shape[1] == q_heads else group
    rows = max(LEAST, triton.next_power_of_2(heads) if own else min(MOST, triton.next_power_of_2(heads * tokens)))
    units = q_heads // heads * (tokens if own else triton.cdiv(heads * tokens, rows))
    keys, warps, stages = tile_of(q, max(dim, v.shape[3]), bits_of(k))
    columns = k.shape[2]
    if selection is not None:
        columns = selection.ids.shape[3] * selection.block
    elif see.window is not None and see.k_pos is None:
        columns = min(columns, see.sink + see.window + tokens)
    splits = splits_of(q.device, batch * units, triton.cdiv(columns, keys))
    shape = (splits, batch, q_heads, tokens)
    sums, stats = (q.new_empty((*shape, n), dtype=torch.float32) if splits > 1 else None for n in (v.shape[3], 2))
    arguments, flags = arguments_of(q, k, v, out, logits, see, selection)
    before, sinks, lap, offset = turn(q, see, turns, k.shape[2])
    more = {"HEADS": heads, "OWN": own, "BM": rows, "BN": keys, "TURNED": lap is not None, "SPLIT": splits > 1}
    with on(q.device):
        _part[(splits, units, batch)](
            *arguments,
            *((x, *x.stride()[:3]) for x in (before, sinks)),
            lap,
            offset,
            sums,
            stats,
            q_heads,
            STAGES=stages,
            num_warps=warps,
            **flags,
            **more,
        )
        if splits > 1:
            merge[(tokens, q_heads, batch)](
                arguments[3],
                sums,
                stats,
                arguments[6],
                None,
                splits,
                q_heads,
                tokens,
                SPLITS=triton.next_power_of_2(splits),
                DIM=v.shape[3],
                WIDTH=width_of(v.shape[3]),
                SUNK=flags["SUNK"],
            )
    return out


def turn(q: Tensor, see: Visibility, turns: Turns | None, stored: int) -> tuple[Any, ...]:
    """Queries as keys of the lap before see them, and as sinks do, the tokens of a lap and those before the first."""
    if turns is None or turns.inv_freq is None:
        return q, q, None, None
    own = positions(see, q.shape[2], stored, q.device)[0]
    moved = torch.full_like(own, turns.lap), turns.sink_pos.to(q.device) - (own - turns.lap * turns.laps(own))
    before, sinks = (rotate(q.float(), x, turns.inv_freq, turns.interleaved).to(q.dtype) for x in moved)
    return before, sinks, turns.lap, turns.offset


def tile_of(q: Tensor, channels: int, bits: int) -> tuple[int, int, int]:
    """Keys of a tile, warps, and tiles on their way."""
    keys = 64 if channels <= 128 else 32
    return (keys // 2 if q.dtype == torch.float32 else keys), 4, 2 if bits else 3


def splits_of(device: torch.device, programs: int, tiles: int) -> int:
    """Among how many programs the keys of a row and KV head are shared out: all that run at a time, of 2 tiles each."""
    at_a_time = 2 * (torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2)
    return max(1, min(at_a_time // programs, -(-tiles // 2), 128))
