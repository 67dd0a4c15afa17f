"""`ops.score_antidiagonal` in Triton: one product of two matrices, of which only what a softmax needs is kept.

Paper: XAttention, arXiv 2503.16428, section 2.1. A program multiplies tiles of queries with tiles of keys, position by
position of a tile, and writes the logarithm of the sum of weights for each block of keys: a part of stride times the
tokens of a block of what the logits would take.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Packed
from .arguments import LARGE, MOST, on, reject_dtypes, shared_of, width_of
from .tiles import LOG2_E

MOST_TILES = 64
"""Tiles of a block; a power of two."""
KEPT = 1 << 27
"""Numbers that are kept at a time."""


@triton.jit
def _kernel(
    q, k, out, source, block_of, places_b, blocks_b, last, last_b, first, count, columns, stored, blocks, factor,
    GROUP: tl.constexpr, TILES: tl.constexpr, STRIDE: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    heads = tl.num_programs(1)
    head, batch = tl.program_id(1), tl.program_id(2)
    row_tiles, column_tiles = tl.cdiv(count, BM), tl.cdiv(columns, BN)
    i, j = tl.program_id(0) // column_tiles, tl.program_id(0) % column_tiles
    i, j = tl.swizzle2d(i, j, row_tiles, column_tiles, 8)
    rows, cols, channels = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN), tl.arange(0, WIDTH)
    number, within = first + rows // TILES, rows % TILES
    block = tl.load(block_of + batch * blocks_b + number, mask=rows < count, other=-1)
    tile = tl.where(block < 0, -1, block * TILES + within)
    if (not CAUSAL) or j * BN <= tl.max(tile, 0):
        end = tl.minimum(tl.load(last + batch * last_b) + 1, stored)
        asked = q[0] + batch.to(tl.int64) * q[1] + head * q[2] + channels[None, :]
        keys = k[0] + batch.to(tl.int64) * k[1] + head // GROUP * k[2] + channels[None, :]
        places = source + batch * places_b + (number * TILES + within) * STRIDE + STRIDE - 1
        x = tl.zeros((BM, BN), tl.float32)
        for n in tl.range(0, STRIDE, num_stages=STAGES):
            at = tl.load(places - n, mask=rows < count, other=-1)
            column = cols * STRIDE + n
            inside = (channels < DIM)[None, :]
            some = tl.load(asked + at.to(tl.int64)[:, None] * q[3], mask=(at >= 0)[:, None] & inside, other=0.0)
            there = (column < end)[:, None] & inside
            others = tl.load(keys + column.to(tl.int64)[:, None] * k[3], mask=there, other=0.0)
            x = tl.dot(some, tl.trans(others), x, input_precision="ieee")
        seen = (cols < columns)[None, :] & (rows < count)[:, None]
        if CAUSAL:
            seen &= cols[None, :] <= tile[:, None]
        x = tl.reshape(tl.where(seen, x * (factor * LOG2_E), float("-inf")), (BM, BN // TILES, TILES))
        largest = tl.max(x, 2)
        largest = tl.where(largest == float("-inf"), 0.0, largest)
        weight = tl.sum(tl.exp2(x - largest[:, :, None]), 2)
        mine = j * (BN // TILES) + tl.arange(0, BN // TILES)
        to = out + ((batch * heads + head) * count + rows).to(tl.int64)[:, None] * blocks + mine[None, :]
        none = weight == 0.0
        logarithm = tl.where(none, float("-inf"), (largest + tl.log2(tl.where(none, 1.0, weight))) * (1.0 / LOG2_E))
        tl.store(to, logarithm, mask=(rows < count)[:, None] & (mine < blocks)[None, :])


def reject(
    q: Tensor, k: Tensor | Packed, q_pos: Tensor, block: int, stride: int, scale: float, causal: bool, rounded: str = ""
) -> str | None:
    """Why the kernel does not compute these scores, or None."""
    if isinstance(k, Packed):
        return "sums up antidiagonals of keys that are not packed only"
    if rounded:
        return "rounds no tiles to 8 bits"
    if {k.device, q_pos.device} != {q.device}:
        return "needs queries, keys and positions on one device"
    if not q.numel() or not k.numel():
        return "takes no empty tensors"
    tiles = block // stride
    if tiles & (tiles - 1) or tiles > MOST_TILES:
        return f"takes a power of 2 of tiles of a block, at most {MOST_TILES}"
    if q.shape[3] > MOST:
        return f"takes at most {MOST} channels"
    return reject_dtypes("queries and keys", q, k)


@torch.no_grad()
def run(
    q: Tensor, k: Tensor, q_pos: Tensor, block: int, stride: int, scale: float, causal: bool, rounded: str = ""
) -> Tensor:
    """`ops.score_antidiagonal`."""
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    (rows, heads, places, dim), (kv_heads, stored) = q.shape, k.shape[1:3]
    tiles, number, blocks, columns = block // stride, places // block, -(-stored // block), -(-stored // stride)
    source, block_of = _sources(q_pos, block)
    last = q_pos.amax(1) if causal else torch.full_like(q_pos[:, 0], stored - 1)
    there = (source.view(len(q_pos), number, tiles, stride) >= 0).any(-1)
    out = torch.empty(rows, heads, number, blocks, dtype=torch.float32, device=q.device)
    size = max(1, KEPT // (rows * heads * tiles * blocks))
    large = q.element_size() == 2 and dim <= 128 and shared_of(q.device) >= LARGE
    rows_of_tile, keys, warps, stages = (128, 128, 8, 3) if large else (64, 64, 4, 2)
    for first in range(0, number, size):
        count = min(size, number - first) * tiles
        kept = torch.full((rows, heads, count, blocks), -torch.inf, device=q.device)
        grid = (triton.cdiv(count, rows_of_tile) * triton.cdiv(columns, keys), heads, rows)
        with on(q.device):
            _kernel[grid](
                (q, *q.stride()[:3]),
                (k, *k.stride()[:3]),
                kept,
                source,
                block_of,
                *(0 if len(q_pos) == 1 else x.shape[1] for x in (source, block_of)),
                last,
                0 if len(q_pos) == 1 else 1,
                first,
                count,
                columns,
                stored,
                blocks,
                scale / stride,
                GROUP=heads // kv_heads,
                TILES=tiles,
                STRIDE=stride,
                DIM=dim,
                WIDTH=width_of(dim),
                BM=rows_of_tile,
                BN=keys,
                CAUSAL=causal,
                STAGES=stages,
                num_warps=warps,
            )
        shares = torch.unflatten(kept.softmax(-1), 2, (-1, tiles))
        here = slice(first, first + count // tiles)
        shares.masked_fill_(~there[:, None, here, :, None], 0.0)
        out[:, :, here] = shares.sum(3)
    return out


def _sources(q_pos: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Which query stands at each place of the blocks, `[B or 1, N * block]`, and which blocks of the text they are."""
    starts = torch.arange(0, q_pos.shape[1], block, device=q_pos.device).repeat_interleave(block)
    at = torch.where(q_pos < 0, q_pos.shape[1], starts + q_pos % block)
    queries = torch.arange(q_pos.shape[1], dtype=torch.int32, device=q_pos.device).expand(q_pos.shape)
    source = torch.full((len(q_pos), q_pos.shape[1] + 1), -1, dtype=torch.int32, device=q_pos.device)
    source = source.scatter_(1, at, queries)[:, :-1].contiguous()
    return source, torch.where(q_pos < 0, -1, q_pos // block).view(len(q_pos), -1, block).amax(2).int()
