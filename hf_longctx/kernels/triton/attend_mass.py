"""`ops.attend_mass` in Triton: attention over chosen blocks, then of each tile of keys its share, by what came out.

Paper: InfLLM (arXiv 2402.04617) section 3.2. Attention is FlashAttention-2's loop; the query heads of a KV head, and
the queries of a list, are the rows of its tiles, whose keys may be shared out among programs. Each row leaves the log
of its sum of weights, with which a second pass (`weigh_keys.py`) adds up the weights of near keys: none is kept, and
nothing waits for the device. At clamped distances, keys and queries are turned before (`turn_rows.py`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import weigh
from ..reference.weigh import empty_out
from ..types import Logits, Packed, Selection, Turns, Visibility
from .arguments import LARGE, LEAST, arguments_of, on, reject_tensors, rows_of, shared_of, width_of
from .attend_pages import merge, splits_of
from .tiles import (
    LOG2_E,
    NEVER,
    average,
    column_of,
    head_of,
    logits_of,
    nothing,
    positions,
    products,
    put,
    queries,
    reached,
    read,
)
from .turn_rows import turned
from .weigh_keys import rows_of_tile, weigh_keys

TURNED = 1 << 27
"""Numbers of keys that are turned at a time; those of one list at least."""


@triton.jit
def _part(
    q, k, v, out, see, lists, sink_logits, slopes, tokens, stored, scale, softcap,
    far_q, far_k, clamp, reach, size, count, totals, sums_of, stats_of,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr,
    BITS: tl.constexpr, K_BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, EACH: tl.constexpr,
    GIVEN: tl.constexpr, PAGED: tl.constexpr, CUT: tl.constexpr, CAPPED: tl.constexpr, SUNK: tl.constexpr,
    SLOPED: tl.constexpr, TURNED: tl.constexpr, CLAMPED: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    strips, each = tl.cdiv(GROUP * size, BM), tl.num_programs(0) // count
    number, tile, splits = tl.program_id(0) // each, tl.program_id(0) % each % strips, each // strips
    split, kv_head, kv_heads, batch = (
        tl.program_id(0) % each // strips,
        tl.program_id(1),
        tl.num_programs(1),
        tl.program_id(2),
    )
    heads, at, valid = rows_of_tile(number, tile, size, tokens, GROUP, BM)
    pos = tl.where(valid, positions(see, batch, at, tokens, stored, GIVEN), -1)
    heads += kv_head * GROUP
    high, low = tl.max(pos, 0), tl.min(tl.where(pos < 0, NEVER, pos), 0)
    offsets, PLAIN = tl.arange(0, BN), not (CAPPED or SLOPED)
    asked = queries(q[0], batch.to(tl.int64) * q[1] + heads * q[2] + at * q[3], valid, DIM, WIDTH, K_BITS)
    keys, values = head_of(k, batch, kv_head), head_of(v, batch, kv_head)
    far_asked, far_keys = asked, keys
    if TURNED:
        places = batch.to(tl.int64) * far_q[1] + heads * far_q[2] + at * far_q[3]
        far_asked = queries(far_q[0], places, valid, DIM, WIDTH, K_BITS)
        far_keys = head_of(far_k, batch, kv_head)
    sums, others, top, total = nothing(BM, V_WIDTH, BITS)
    slope = tl.zeros((BM,), tl.float32)
    if SLOPED:
        slope += tl.load(slopes + heads, mask=valid, other=0.0)
    if SUNK and not SPLIT:
        top, total = tl.load(sink_logits + heads, mask=valid, other=0.0) * LOG2_E, total + 1.0

    block, chosen = lists[6], lists[7]
    mine = batch.to(tl.int64) * lists[2] + (kv_head * lists[5] // kv_heads) * lists[3] + number * lists[4]
    ids, pages = lists[0] + mine, lists[1] + mine
    far, some_far, whole, seen = reached(ids, chosen, low, high, block, stored, clamp, PAGED, CUT, TURNED)
    begin = split * tl.cdiv(seen * EACH, splits)
    end = tl.minimum(begin + tl.cdiv(seen * EACH, splits), seen * EACH)
    near = tl.minimum(tl.maximum(some_far * EACH, begin), end)  # tiles from here on are near to all queries
    rest = tl.minimum(tl.maximum(whole * EACH, near), end)  # and up to here are seen as a whole
    factor = scale * LOG2_E

    start = begin
    if TURNED:
        start = tl.minimum(tl.maximum(tl.minimum(far * EACH, reach // BN), begin), near)
        for i in tl.range(begin, start, num_stages=STAGES):
            column = column_of(pages, i, chosen, BN, EACH).to(tl.int64)
            key = read(
                far_keys, number.to(tl.int64) * reach + i * BN, offsets, offsets >= 0, asked[0],
                DIM, WIDTH, K_BITS, False,
            )  # fmt: skip
            value = read(values, column, offsets, offsets >= 0, asked[0], V_DIM, V_WIDTH, BITS, False)
            x = products(far_asked, key, K_BITS)
            if PLAIN:
                sums, others, top, total = average((sums, others, top, total), x, factor, value, BITS, True)
            else:
                x = logits_of(x, (pos * 0 - clamp)[:, None], scale, softcap, slope[:, None], CAPPED, SLOPED)
                sums, others, top, total = average((sums, others, top, total), x, 1.0, value, BITS, True)

    column = column_of(pages, near, chosen, BN, EACH)
    for i in tl.range(near, rest, num_stages=STAGES):
        first = column.to(tl.int64)
        if TURNED:
            first = number.to(tl.int64) * (chosen * block) + i * BN
        key = read(keys, first, offsets, offsets >= 0, asked[0], DIM, WIDTH, K_BITS, False)
        value = read(values, column.to(tl.int64), offsets, offsets >= 0, asked[0], V_DIM, V_WIDTH, BITS, False)
        x = products(asked, key, K_BITS)
        if PLAIN:
            sums, others, top, total = average((sums, others, top, total), x, factor, value, BITS, True)
        else:
            distance = (column_of(ids, i, chosen, BN, EACH) + offsets)[None, :] - pos[:, None]
            if CLAMPED:
                distance = tl.maximum(distance, -clamp)
            x = logits_of(x, distance, scale, softcap, slope[:, None], CAPPED, SLOPED)
            sums, others, top, total = average((sums, others, top, total), x, 1.0, value, BITS, True)
        column = column_of(pages, i + 1, chosen, BN, EACH)

    for j in tl.range(0, near - start + end - rest, num_stages=1):
        i = tl.where(start + j < near, start + j, rest + j - (near - start))
        column, key_pos = column_of(pages, i, chosen, BN, EACH), column_of(ids, i, chosen, BN, EACH) + offsets
        there = (column + offsets < stored) & (key_pos <= high)
        first = column.to(tl.int64)
        if TURNED:
            first = number.to(tl.int64) * (chosen * block) + i * BN
        key = read(keys, first, offsets, there, asked[0], DIM, WIDTH, K_BITS, True)
        value = read(values, column.to(tl.int64), offsets, there, asked[0], V_DIM, V_WIDTH, BITS, True)
        distance = key_pos[None, :] - pos[:, None]
        x = products(asked, key, K_BITS)
        if TURNED:
            inside = there & (i * BN + offsets < reach)
            key = read(
                far_keys, number.to(tl.int64) * reach + i * BN, offsets, inside, asked[0], DIM, WIDTH, K_BITS, True
            )
            x = tl.where(inside[None, :] & (distance < -clamp), products(far_asked, key, K_BITS), x)
        visible = there[None, :] & (distance <= 0)
        if CLAMPED:
            distance = tl.maximum(distance, -clamp)
        x = tl.where(visible, logits_of(x, distance, scale, softcap, slope[:, None], CAPPED, SLOPED), float("-inf"))
        sums, others, top, total = average((sums, others, top, total), x, 1.0, value, BITS, False)

    if SPLIT:
        place = ((split * tl.num_programs(2) + batch) * (kv_heads * GROUP) + heads) * tokens + at
        tl.store(stats_of + place * 2, top, mask=valid)
        tl.store(stats_of + place * 2 + 1, total, mask=valid)
        put(sums_of, place.to(tl.int64) * V_DIM, valid, sums, others, V_DIM, V_WIDTH, BITS)
    else:
        none = (total == 0.0) | (pos < 0)
        divisor = tl.where(none, 1.0, total)
        place = (batch * (kv_heads * GROUP) + heads) * tokens + at
        tl.store(totals + place, tl.where(none, float("inf"), top + tl.log2(divisor)), mask=valid)
        sums = tl.where(none[:, None], 0.0, sums / divisor[:, None])
        others = tl.where(none[:, None], 0.0, others / divisor[:, None]) if BITS == 4 else others
        place = batch.to(tl.int64) * out[1] + heads * out[2] + at * out[3]
        put(out[0], place, valid, sums, others, V_DIM, V_WIDTH, BITS)


def reject(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection,
    near: int,
) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    if turns is not None and turns.inv_freq is not None and turns.clamp is None:
        return "turns queries to keys at clamped distances only"
    if selection.block % LEAST:
        return f"takes blocks of a multiple of {LEAST} keys"
    return reject_tensors(q, k, v, logits) if selection.ids.numel() else "takes no empty lists"


def run(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection,
    near: int,
) -> tuple[Tensor, Tensor]:
    """`ops.attend_mass`."""
    q = q if q.stride(3) == 1 else q.contiguous()
    (rows, count, chosen), kv_heads = (selection.ids.shape[i] for i in (0, 2, 3)), k.shape[1]
    out, length = empty_out(q, v.shape[3]), chosen * selection.block
    mass = q.new_empty(rows, kv_heads, count, length, dtype=torch.float32)
    some = count
    if turns is not None and turns.inv_freq is not None:
        some = min(count, max(1, TURNED // (rows * kv_heads * length * q.shape[3])))
    own = weigh.positions(see, q.shape[2], k.shape[2], q.device)[0] if some < count else None
    with on(q.device):
        for first in range(0, count, some):
            lists, here = (
                slice(first, first + some),
                slice(first * selection.q_block, (first + some) * selection.q_block),
            )
            part = selection
            if own is not None:
                pages = None if selection.pages is None else selection.pages[:, :, lists]
                part = replace(selection, ids=selection.ids[:, :, lists], pages=pages)
                see = Visibility(q_pos=own[:, here])
            _read(q[:, :, here], k, v, logits, see, turns, part, near, out[:, :, here], mass[:, :, lists])
    return out, mass


def _read(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection,
    near: int,
    out: Tensor,
    mass: Tensor,
) -> None:
    (rows, heads, tokens, dim), kv_heads, count = q.shape, k.shape[1], selection.ids.shape[2]
    size, channels = min(selection.q_block, tokens), max(dim, v.shape[3])
    arguments, flags = arguments_of(q, k, v, out, logits, see, selection)
    asked, keys, values, to, places, lists, sinks, slopes, *numbers = arguments
    far_asked, far_keys, reach, clamp = asked, keys, 0, (turns and turns.clamp) or 0
    bits, is_turned = flags["BITS"], False
    if turns is not None and turns.inv_freq is not None:
        bits, is_turned = 0, True
        made = turned(q, k, see, turns, selection, size)
        asked, far_asked = ((x, *x.stride()[:3]) for x in (made.q, made.far_q))
        keys, far_keys, reach = rows_of(made.k), rows_of(made.far_k), made.reach
    shared = {name: flags[name] for name in ("GROUP", "DIM", "GIVEN", "CAPPED", "SLOPED")} | {
        "WIDTH": width_of(dim, bits),
        "K_BITS": bits,
        "TURNED": is_turned,
        "CLAMPED": clamp > 0 and logits.slopes is not None,
    }
    more = {name: flags[name] for name in ("V_DIM", "V_WIDTH", "BITS", "SUNK")}
    paged = selection.pages is not None
    tile, some, compiled = tile_of(q, channels)
    tile = min(tile, max(LEAST, triton.next_power_of_2(heads // kv_heads * size)))
    some = min(some, selection.block & -selection.block)
    strips, length = triton.cdiv(heads // kv_heads * size, tile), mass.shape[3]
    splits = splits_of(q.device, strips * kv_heads * rows * count, triton.cdiv(length, some))
    totals = q.new_empty(rows, heads, tokens, dtype=torch.float32)
    shape = (splits, *totals.shape)
    sums, stats = (q.new_empty((*shape, n), dtype=torch.float32) if splits > 1 else None for n in (v.shape[3], 2))
    turning = (far_asked, far_keys, clamp, reach, size, count)
    _part[(strips * splits * count, kv_heads, rows)](
        asked, keys, values, to, places, lists, sinks, slopes, *numbers, *turning, totals, sums, stats,
        BM=tile, BN=some, EACH=selection.block // some, PAGED=paged, CUT=paged and k.shape[2] % selection.block > 0,
        SPLIT=splits > 1, **shared, **more, **compiled,
    )  # fmt: skip
    if splits > 1:
        merge[(tokens, heads, rows)](
            to, sums, stats, sinks, totals, splits, heads, tokens, SPLITS=triton.next_power_of_2(splits),
            DIM=v.shape[3], WIDTH=width_of(v.shape[3]), SUNK=flags["SUNK"],
        )  # fmt: skip
    reads_far = is_turned and near > clamp + 1
    weigh_keys(
        (asked, keys, places, lists, slopes, *numbers, *turning, totals),
        mass,
        near,
        selection.block,
        reads_far,
        q,
        shared,
    )


def tile_of(q: Tensor, channels: int) -> tuple[int, int, dict[str, int]]:
    """Rows and keys of a tile, and how it is compiled; channels: of keys or values, the larger number."""
    if q.dtype == torch.float32:
        rows, keys, warps = (32, 32, 8) if channels <= 128 else (16, 16, 4)
    elif channels > 128 or shared_of(q.device) < LARGE:
        rows, keys, warps = 64, 32, 4
    else:
        rows, keys, warps = 64, 64, 4
    return rows, keys, {"num_warps": warps, "STAGES": 2}
