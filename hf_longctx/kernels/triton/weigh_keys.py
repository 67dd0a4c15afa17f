"""Attention that each chosen key got, by the queries near it, once each row's sum of weights is known."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import LARGE, LEAST, shared_of
from .tiles import NEVER, column_of, head_of, logits_of, positions, products, queries, read
from .turn_rows import span


@triton.jit
def rows_of_tile(number, tile, size, tokens, GROUP: tl.constexpr, BM: tl.constexpr):
    """Rows of a tile of a list: their heads of the KV head, queries of the call, and whether they are there."""
    rows = tile * BM + tl.arange(0, BM)
    heads, at = rows // size, number * size + rows % size
    return heads, at, (heads < GROUP) & (at < tokens)


@triton.jit
def _weigh(
    q, k, see, lists, slopes, tokens, stored, scale, softcap, far_q, far_k, clamp, reach, size, count, totals,
    mass, near, GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, K_BITS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, EACH: tl.constexpr, GIVEN: tl.constexpr, CAPPED: tl.constexpr, SLOPED: tl.constexpr,
    TURNED: tl.constexpr, FAR: tl.constexpr, CLAMPED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Weights of a tile of keys, added up over the queries less than `near` away; FAR: some may be far ones."""
    each = tl.num_programs(0) // count
    number, i, batch = tl.program_id(0) // each, tl.program_id(0) % each, tl.program_id(2)
    kv_head, kv_heads = tl.program_id(1), tl.num_programs(1)
    offsets, block, chosen = tl.arange(0, BN), lists[6], lists[7]
    mine = batch.to(tl.int64) * lists[2] + (kv_head * lists[5] // kv_heads) * lists[3] + number * lists[4]
    column, begin = column_of(lists[1] + mine, i, chosen, BN, EACH), column_of(lists[0] + mine, i, chosen, BN, EACH)
    low, high = span(see, batch, number * size, size, tokens, stored, GIVEN)
    key_pos = begin + offsets
    there = (key_pos >= 0) & (column + offsets < stored) & (key_pos <= high) & (key_pos > low - near)
    to = mass[0] + batch.to(tl.int64) * mass[1] + kv_head * mass[2] + number.to(tl.int64) * mass[3] + i * BN + offsets
    if tl.sum(there.to(tl.int32), 0) == 0:
        tl.store(to, tl.zeros((BN,), tl.float32))
        return
    first = column.to(tl.int64)
    if TURNED:
        first = number.to(tl.int64) * (chosen * block) + i * BN
    like = tl.zeros((1,), q[0].dtype.element_ty)
    key = read(head_of(k, batch, kv_head), first, offsets, there, like, DIM, WIDTH, K_BITS, True)
    far_key = key
    inside = i * BN + offsets < reach
    if FAR:
        first = number.to(tl.int64) * reach + i * BN
        far_key = read(head_of(far_k, batch, kv_head), first, offsets, there & inside, like, DIM, WIDTH, K_BITS, True)
    sums = tl.zeros((BM, BN), tl.float32)
    whole = (begin + BN - 1 <= low) & (begin > high - near) & (column + BN <= stored)
    if whole and not (SLOPED or FAR):  # to all queries, and near all
        for tile in tl.range(0, tl.cdiv(GROUP * size, BM), num_stages=STAGES):
            heads, at, valid = rows_of_tile(number, tile, size, tokens, GROUP, BM)
            heads += kv_head * GROUP
            place = (batch * (kv_heads * GROUP) + heads) * tokens + at
            total = tl.load(totals + place, mask=valid, other=float("inf"))
            asked = queries(q[0], batch.to(tl.int64) * q[1] + heads * q[2] + at * q[3], valid, DIM, WIDTH, K_BITS)
            x = logits_of(products(asked, key, K_BITS), 0, scale, softcap, 0.0, CAPPED, False)
            sums += tl.exp2(x - total[:, None])
    else:
        for tile in tl.range(0, tl.cdiv(GROUP * size, BM), num_stages=STAGES):
            heads, at, valid = rows_of_tile(number, tile, size, tokens, GROUP, BM)
            pos = tl.where(valid, positions(see, batch, at, tokens, stored, GIVEN), -1)
            heads += kv_head * GROUP
            place = (batch * (kv_heads * GROUP) + heads) * tokens + at
            total = tl.load(totals + place, mask=valid, other=float("inf"))
            asked = queries(q[0], batch.to(tl.int64) * q[1] + heads * q[2] + at * q[3], valid, DIM, WIDTH, K_BITS)
            x = products(asked, key, K_BITS)
            distance = key_pos[None, :] - pos[:, None]
            visible = there[None, :] & (distance <= 0) & (distance > -near)
            if FAR:
                places = batch.to(tl.int64) * far_q[1] + heads * far_q[2] + at * far_q[3]
                far_asked = queries(far_q[0], places, valid, DIM, WIDTH, K_BITS)
                x = tl.where(inside[None, :] & (distance < -clamp), products(far_asked, far_key, K_BITS), x)
            slope = tl.zeros((BM,), tl.float32)
            if SLOPED:
                slope += tl.load(slopes + heads, mask=valid, other=0.0)
            if CLAMPED:
                distance = tl.maximum(distance, -clamp)
            x = logits_of(x, distance, scale, softcap, slope[:, None], CAPPED, SLOPED)
            sums += tl.exp2(tl.where(visible, x - total[:, None], float("-inf")))
    tl.store(to, tl.sum(sums, 0))


def weigh_keys(
    arguments: tuple[Any, ...], mass: Tensor, near: int, block: int, far: bool, q: Tensor, flags: dict[str, Any]
) -> None:
    """Write the `mass` of `attend_mass`.

    Args:
        arguments: of the kernel, up to the totals of rows.
        mass: `[B, Hkv, N, K * block]`.
        near: a query counts for a key at a distance below this.
        block: tokens of a block of keys.
        far: whether a key beyond the clamped distance may count.
        q: queries; their shape and dtype say how large tiles are.
        flags: what the kernel is compiled for.
    """
    rows, keys, compiled = tile_of(q)
    rows = min(rows, max(LEAST, triton.next_power_of_2(flags["GROUP"] * q.shape[2])))
    keys = min(keys, block & -block)
    (batch, kv_heads, count, length), near = mass.shape, min(near, NEVER.value)
    _weigh[(length // keys * count, kv_heads, batch)](
        *arguments, (mass, *mass.stride()[:3]), near,
        BM=rows, BN=keys, EACH=block // keys, FAR=far, **flags, **compiled,
    )  # fmt: skip


def tile_of(q: Tensor) -> tuple[int, int, dict[str, int]]:
    """Rows and keys of a tile, and how it is compiled."""
    if q.dtype == torch.float32:
        rows, keys, stages = (32, 32, 2) if q.shape[3] <= 128 else (16, 16, 2)
    elif q.shape[3] > 128 or shared_of(q.device) < LARGE:
        rows, keys, stages = 32, 64, 2
    else:
        rows, keys, stages = 64, 64, 3
    return rows, keys, {"num_warps": 4, "STAGES": stages}
