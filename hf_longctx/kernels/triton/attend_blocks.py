"""`ops.attend_blocks` in Triton: FlashAttention-2's loop over the tiles of keys that a tile of queries sees.

Paper: arXiv 2307.08691, section 3.1. One program has a tile of queries of one head. Keys that all of its queries see
come first, and are not masked; then those at the edges of what is seen. The longest programs start first, and the heads
of a KV head side by side.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..reference.weigh import empty_out
from ..types import Logits, Packed, Selection, Turns, Visibility
from .arguments import LEAST, arguments_of, on, reject_tensors, reject_turns, tile_of, tiles_of
from .tiles import (
    COLUMNS,
    LISTS,
    LOG2_E,
    NEVER,
    PLACES,
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


@triton.jit
def _band(
    tile, low, high, tokens, stored, see, BM: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr, WINDOWED: tl.constexpr
):
    """Tiles of keys that are seen: how many of sinks, the first beyond, the first whole, the first after, the end."""
    sink, window = see[4], see[5]
    near, last = high, tl.minimum(high, stored - 1)  # the last query, and the last column
    far = low
    if MODE == PLACES:  # the last columns are the queries' own
        last = tl.minimum(stored, stored - tokens + (tile + 1) * BM) - 1
        far = stored - tokens + tile * BM
    end = tl.cdiv(last + 1, BN)
    sinks, first = 0, 0
    if WINDOWED:
        first = tl.minimum(tl.maximum(far - window + 1, 0) // BN, end)
        sinks = tl.minimum(tl.cdiv(tl.minimum(sink, last + 1), BN), first)
    whole, rest = first, first
    if MODE == COLUMNS:
        if WINDOWED:
            whole = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(near - window + 1, 0), BN), first), end)
        rest = tl.minimum(tl.maximum(tl.minimum((low + 1) // BN, stored // BN), whole), end)
    return sinks, first, whole, rest, end


@triton.jit
def _both(
    k, v, k_tiles, v_tiles, k_at, v_at, batch, head, column, offsets, there, like, DIM: tl.constexpr,
    WIDTH: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, BITS: tl.constexpr, TILED: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """A tile of keys and of values; CUT: values are zero where they are not there."""
    if TILED:
        key = k_tiles.load([batch * k_at[0] + head * k_at[1] + column, head * k_at[2]])
        value = v_tiles.load([batch * v_at[0] + head * v_at[1] + column, head * v_at[2]])
        if CUT:
            value = tl.where(there[:, None], value, 0.0)
        return (key, key), (value, value)
    first = column.to(tl.int64)
    key = read(k, first, offsets, there, like, DIM, WIDTH, BITS, CUT)
    return key, read(v, first, offsets, there, like, V_DIM, V_WIDTH, BITS, CUT)


@triton.jit
def _kernel(
    q, k, v, out, see, lists, sink_logits, slopes, tokens, stored, scale, softcap, k_tiles, v_tiles, k_at, v_at,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr,
    BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, MODE: tl.constexpr,
    GIVEN: tl.constexpr, PAGED: tl.constexpr, CUT: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SUNK: tl.constexpr, SLOPED: tl.constexpr, STAGES: tl.constexpr, TILED: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    tile = tl.cdiv(tokens, BM) - 1 - tl.program_id(0) // GROUP
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    head = kv_head * GROUP + tl.program_id(0) % GROUP
    rows, offsets = tile * BM + tl.arange(0, BM), tl.arange(0, BN)
    pos = positions(see, batch, rows, tokens, stored, GIVEN)
    high, low = tl.max(pos, 0), tl.min(tl.where(pos < 0, NEVER, pos), 0)
    sink, window = see[4], see[5]

    asked = queries(
        q[0] + batch.to(tl.int64) * q[1] + head * q[2], rows.to(tl.int64) * q[3], rows < tokens, DIM, WIDTH, BITS
    )
    keys, values = head_of(k, batch, kv_head), head_of(v, batch, kv_head)
    slope, PLAIN = 0.0, not (CAPPED or SLOPED)
    sums, others, top, total = nothing(BM, V_WIDTH, BITS)
    if SLOPED:
        slope = tl.load(slopes + head)
    if SUNK:
        top, total = total + tl.load(sink_logits + head) * LOG2_E, total + 1.0

    if MODE == LISTS:
        block, chosen = lists[6], lists[7]
        mine = batch.to(tl.int64) * lists[2] + (head * lists[5] // (GROUP * tl.num_programs(1))) * lists[3]
        mine += (tile * BM // lists[8]) * lists[4]
        ids, pages = lists[0] + mine, lists[1] + mine
        _, _, whole, seen = reached(ids, chosen, low, high, block, stored, 0, PAGED, CUT, False)
        count, some = whole * EACH, (seen - whole) * EACH
        column = column_of(pages, 0, chosen, BN, EACH)
    else:
        sinks, first, whole, rest, end = _band(tile, low, high, tokens, stored, see, BM, BN, MODE, WINDOWED)
        count, some = rest - whole, sinks + whole - first + end - rest
        column = whole * BN

    for i in tl.range(0, count, num_stages=STAGES):
        key, value = _both(
            keys, values, k_tiles, v_tiles, k_at, v_at, batch, kv_head, column, offsets, offsets >= 0, asked[0],
            DIM, WIDTH, V_DIM, V_WIDTH, BITS, TILED, False,
        )  # fmt: skip
        distance = 0
        if SLOPED:
            begin = column
            if MODE == LISTS:
                begin = column_of(ids, i, chosen, BN, EACH)
            distance = (begin + offsets)[None, :] - pos[:, None]
        x = products(asked, key, BITS)
        if PLAIN:
            sums, others, top, total = average((sums, others, top, total), x, scale * LOG2_E, value, BITS, True)
        else:
            x = logits_of(x, distance, scale, softcap, slope, CAPPED, SLOPED)
            sums, others, top, total = average((sums, others, top, total), x, 1.0, value, BITS, True)
        if MODE == LISTS:
            column = column_of(pages, i + 1, chosen, BN, EACH)
        else:
            column += BN

    for i in tl.range(0, some, num_stages=1):
        if MODE == LISTS:
            column, begin = column_of(pages, count + i, chosen, BN, EACH), column_of(ids, count + i, chosen, BN, EACH)
        else:
            beyond = i - sinks
            number = tl.where(beyond < whole - first, first + beyond, rest + beyond - (whole - first))
            column = tl.where(beyond < 0, i, number) * BN
            begin = column
        there = column + offsets < stored
        key_pos = begin + offsets
        if MODE == PLACES:
            key_pos = tl.load(see[2] + batch * see[3] + column + offsets, mask=there, other=-1).to(tl.int32)
        there &= (key_pos >= 0) & (key_pos <= high)
        key, value = _both(
            keys, values, k_tiles, v_tiles, k_at, v_at, batch, kv_head, column, offsets, there, asked[0],
            DIM, WIDTH, V_DIM, V_WIDTH, BITS, TILED, True,
        )  # fmt: skip
        distance = key_pos[None, :] - pos[:, None]
        x = products(asked, key, BITS)
        factor = scale * LOG2_E
        if not PLAIN:
            x = logits_of(x, distance, scale, softcap, slope, CAPPED, SLOPED)
            factor = 1.0
        visible = there[None, :] & (distance <= 0)
        if WINDOWED:
            visible &= (distance > -window) | (key_pos < sink)[None, :]
        x = tl.where(visible, x, float("-inf"))
        sums, others, top, total = average((sums, others, top, total), x, factor, value, BITS, False)

    none = (total == 0.0) | (pos < 0)
    share = tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, total))[:, None]
    others = tl.where(share == 0.0, 0.0, others * share) if BITS == 4 else 0.0
    to = out[0] + batch.to(tl.int64) * out[1] + head * out[2]
    sums = tl.where(share == 0.0, 0.0, sums * share)
    put(to, rows.to(tl.int64) * out[3], rows < tokens, sums, others, V_DIM, V_WIDTH, BITS)


def reject(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> str | None:
    """Why the kernel does not take these arguments, or None."""
    if selection is None and turns is None and _is_dense(q, k, logits, see):
        return "leaves plain causal attention to torch"
    reason = reject_tensors(q, k, v, logits) or reject_turns(logits, turns)
    if reason is not None or selection is None:
        return reason
    if selection.block % LEAST:
        return f"takes blocks of a multiple of {LEAST} keys"
    if selection.q_block % LEAST and selection.ids.shape[2] > 1:
        return f"takes blocks of a multiple of {LEAST} queries"
    return None if selection.ids.numel() else "takes no empty lists"


def _is_dense(q: Tensor, k: Tensor | Packed, logits: Logits, see: Visibility) -> bool:
    """True for causal attention of a whole text, which torch's kernels are fastest at."""
    stored = k.shape[2]
    whole = see.aligned and q.shape[2] == stored and (see.window is None or see.window >= stored)
    return whole and logits.plain


def run(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> Tensor:
    """`ops.attend_blocks`."""
    q = q if q.stride(3) == 1 else q.contiguous()
    out = empty_out(q, v.shape[3])
    tokens, stored, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    simple = isinstance(k, Tensor) and logits.plain
    rows, keys, compiled = tile_of(q, max(q.shape[3], v.shape[3]), simple, selection is not None)
    rows = min(rows, max(LEAST, triton.next_power_of_2(tokens)))
    cut, each = False, 1
    if selection is not None:
        keys = min(keys, selection.block & -selection.block)
        if selection.ids.shape[2] > 1:
            rows = min(rows, selection.q_block & -selection.q_block)
        cut, each = selection.pages is not None and stored % selection.block > 0, selection.block // keys
    some, others = tiles_of(k, keys), tiles_of(v, keys)
    tiled = some is not None and others is not None
    tiles = (some[0], others[0], some[1], others[1]) if some and others else (None,) * 4
    arguments, flags = arguments_of(q, k, v, out, logits, see, selection)
    paged = selection is not None and selection.pages is not None
    more = {"BM": rows, "BN": keys, "PAGED": paged, "CUT": cut, "TILED": tiled, "EACH": each}
    with on(q.device):
        grid = (triton.cdiv(tokens, rows) * group, k.shape[1], q.shape[0])
        _kernel[grid](*arguments, *tiles, **flags, **more, **compiled)
    return out
