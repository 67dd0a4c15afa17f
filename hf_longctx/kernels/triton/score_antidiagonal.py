"""`ops.score_antidiagonal` in Triton: one product of tiles, of which only sums over blocks of keys are written.

Paper: XAttention (arXiv:2503.16428) section 2.1. Tiles of queries, the last query first, and tiles of keys are put side
by side; of their product the log-sum-exp of each tile of queries over each block of keys is kept, for some blocks of
queries at a time; these become shares, which are added up over the tiles of a block of queries. What is not seen of the
product is left out, and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..types import Packed
from .arguments import LARGE, MOST, bits_of, on, reject_stored, rows_of, shared_of, width_of
from .tiles import LOG2_E, head_of, put, queries, read

SUMS = 1 << 26
"""Of tiles of queries over blocks of keys that are held at a time, in float32; one strip of tiles at least."""
ROWS, DEPTH, BUNCH = 128, 64, 8
"""Tiles of queries of a strip, terms of a step of the product, and strips that walk over the keys together."""
TOKENS, BLOCKS = 64, 256
"""That a program puts side by side, or makes shares of, at a time."""
MOST_TILES = 64
"""Of a block."""


@triton.jit(do_not_specialize=["apart", "tile", "reach", "last", "blocks", "strips", "block", "stride", "tiles"])
def _places(
    q_pos, apart, source, tile, reach, last, blocks, strips, block, stride, tiles,
    ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Where the queries of a block stand, as `Located` has it; all of that is -1 before."""
    n, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offsets = tl.arange(0, SIZE)
    pos = tl.load(q_pos + batch * apart + n * block + offsets, mask=offsets < block, other=-1).to(tl.int32)
    given = pos >= 0
    within = tl.where(given, pos % block, 0)
    line = batch * blocks + n
    tl.store(source + line * block + within, n * block + offsets, mask=given)
    tl.atomic_max(tile + line * tiles + within // stride, pos // stride, mask=given)
    high = tl.max(pos, 0)
    if high >= 0:
        tl.atomic_max(reach + batch * strips + n * tiles // ROWS, high // stride)
        tl.atomic_max(last + batch, high)


@triton.jit(do_not_specialize=["last", "last_b", "stored", "columns", "stride"])
def _put_keys(
    k, last, last_b, out, stored, columns, stride, depth,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, CAUSAL: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Keys of a tile side by side; zero where there is none."""
    head, batch = tl.program_id(1), tl.program_id(2)
    column = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    there = column < stored
    if CAUSAL:
        there &= column <= tl.load(last + batch * last_b)
    like = tl.zeros((1,), out.dtype.element_ty)
    key = read(
        head_of(k, batch, head), tl.zeros((), tl.int64), column.to(tl.int64), there, like, DIM, WIDTH, BITS, True
    )
    row = (batch * tl.num_programs(1) + head).to(tl.int64) * columns + column // stride
    put(out, row * depth + column % stride * DIM, column < columns * stride, key[0], key[1], DIM, WIDTH, BITS)


@triton.jit(do_not_specialize=["source_b", "first", "count", "stride"])
def _put_queries(
    q, source, source_b, out, first, count, stride, depth, DIM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Queries of a tile side by side, the last first; zero where there is none."""
    head, batch = tl.program_id(1), tl.program_id(2)
    place = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    mirrored = first + place // stride * stride + stride - 1 - place % stride
    token = tl.load(source + batch.to(tl.int64) * source_b + mirrored, mask=place < count * stride, other=-1)
    rows = q[0] + batch.to(tl.int64) * q[1] + head * q[2]
    query = queries(rows, token.to(tl.int64) * q[3], token >= 0, DIM, WIDTH, 0)
    row = (batch * tl.num_programs(1) + head).to(tl.int64) * count + place // stride
    put(out, row * depth + place % stride * DIM, place < count * stride, query[0], query[1], DIM, WIDTH, 0)


@triton.jit(do_not_specialize=["tile", "tile_b", "reach", "reach_b", "count", "columns", "group", "strips", "bunch"])
def _product(
    asked, keys, sums, tile, tile_b, reach, reach_b, count, columns, blocks, depth, group, strips, bunch,
    factor, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    TILES: tl.constexpr, CAUSAL: tl.constexpr, STAGES: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """Log2-sum-exp2 of BM tiles of queries over the blocks of BN tiles of keys; heads of a KV head walk together."""
    place, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head = kv_head * group + place % group
    steps = tl.cdiv(columns, BN)
    walk = place // group // bunch
    strip, step = walk // steps * bunch + place // group % bunch, walk % steps
    if strip >= strips:
        return
    furthest = columns
    if CAUSAL:
        furthest = tl.load(reach + batch * reach_b + strip)
    if step * BN > furthest:
        return
    first = (batch * tl.num_programs(1) * group + head) * count + strip * BM
    begin = (batch * tl.num_programs(1) + kv_head) * columns + step * BN
    x = tl.zeros((BM, BN), tl.float32)
    if TILED:
        for i in tl.range(0, depth, BK, num_stages=STAGES):
            x = tl.dot(asked.load([first, i]), tl.trans(keys.load([begin, i])), x)
    else:
        terms = tl.arange(0, BK)[None, :]
        row = first + tl.minimum(tl.arange(0, BM), count - 1 - strip * BM)
        column = begin + tl.minimum(tl.arange(0, BN), columns - 1 - step * BN)
        some = asked + row.to(tl.int64)[:, None] * depth + terms
        others = keys + column.to(tl.int64)[:, None] * depth + terms
        for _ in tl.range(0, depth, BK, num_stages=STAGES):
            x = tl.dot(tl.load(some), tl.trans(tl.load(others)), x)
            some += BK
            others += BK
    row, column = strip * BM + tl.arange(0, BM), step * BN + tl.arange(0, BN)
    at = tl.load(tile + batch.to(tl.int64) * tile_b + row, mask=row < count, other=-1)
    seen = (column < columns)[None, :] & (at >= 0)[:, None]
    if CAUSAL:
        seen &= column[None, :] <= at[:, None]
    x = tl.where(seen, x * factor, float("-inf"))
    top = tl.max(x, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    shares = tl.sum(tl.reshape(tl.exp2(x - top[:, None]), (BM, BN // TILES, TILES)), 2)
    nothing = shares == 0.0
    shares = tl.where(nothing, float("-inf"), tl.log2(tl.where(nothing, 1.0, shares)) + top[:, None])
    block = step * (BN // TILES) + tl.arange(0, BN // TILES)
    to = sums + (first.to(tl.int64) + tl.arange(0, BM))[:, None] * blocks + block[None, :]
    tl.store(to, shares, mask=(row < count)[:, None] & (block < blocks)[None, :])


@triton.jit(do_not_specialize=["tile", "tile_b", "out_n", "count", "first"])
def _shares(
    sums, tile, tile_b, out, out_n, count, first, blocks,
    TILES: tl.constexpr, BLOCKS: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Scores of a block of queries, of the sums of its tiles."""
    n, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = tl.load(tile + batch.to(tl.int64) * tile_b + n * TILES + tl.arange(0, TILES))
    line = (batch * tl.num_programs(1) + head).to(tl.int64)
    rows = sums + (line * count + n * TILES + tl.arange(0, TILES))[:, None] * blocks
    reach = tl.max(at, 0)
    seen = tl.where(reach < 0, 0, blocks)
    if CAUSAL:
        seen = tl.minimum(seen, reach // TILES + 1)
    top, total = tl.full((TILES,), float("-inf"), tl.float32), tl.zeros((TILES,), tl.float32)
    for begin in range(0, seen, BLOCKS):
        block = (begin + tl.arange(0, BLOCKS))[None, :]
        x = tl.load(rows + block, mask=(block < seen) & (at >= 0)[:, None], other=float("-inf"))
        largest = tl.maximum(top, tl.max(x, 1))
        finite = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp2(top - finite) + tl.sum(tl.exp2(x - finite[:, None]), 1)
        top = largest
    top = tl.where(top == float("-inf"), 0.0, top)
    part = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    to = out + (line * out_n + first + n) * blocks
    for begin in range(0, blocks, BLOCKS):
        block = begin + tl.arange(0, BLOCKS)
        mask = (block < seen)[None, :] & (at >= 0)[:, None]
        x = tl.load(rows + block[None, :], mask=mask, other=float("-inf"))
        tl.store(to + block, tl.sum(tl.exp2(x - top[:, None]) * part[:, None], 0), mask=block < blocks)


def reject(
    q: Tensor, k: Tensor | Packed, q_pos: Tensor, block: int, stride: int, scale: float, causal: bool, rounded: str = ""
) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    if rounded:
        return "rounds nothing to 8 bits"
    if not q.numel() or not k.shape[2]:
        return "takes no empty tensors"
    if {k.device, q_pos.device} != {q.device}:
        return "needs queries, keys and positions on one device"
    if k.dtype != q.dtype or q.dtype not in (torch.float16, torch.bfloat16):
        return "needs queries and keys in one dtype, float16 or bfloat16"
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        return "has no bfloat16 in Triton's interpreter, which gets it wrong"
    if q.shape[3] > MOST:
        return f"takes at most {MOST} channels"
    tiles = block // stride
    if tiles & (tiles - 1) or tiles > MOST_TILES:
        return f"takes blocks of 1, 2, 4, 8, 16, 32 or {MOST_TILES} strides"
    return reject_stored(k)


@dataclass(frozen=True)
class Located:
    """Where queries stand, int32, in the text that is cut into tiles.

    Args:
        source: `[B or 1, N * block]`, the query of the call at each place of its blocks, -1 for none.
        tile: `[B or 1, N * tiles]`, which tile of the text each tile of queries is, -1 where it has none.
        reach: `[B or 1, strips]`, the last tile of the text of so many tiles of queries.
        last: `[B or 1, 1]`, the last position of a row.
    """

    source: Tensor
    tile: Tensor
    reach: Tensor
    last: Tensor

    def of(self, name: str, first: int = 0) -> tuple[Tensor, int]:
        """Address from a place on, and how far rows are apart."""
        x: Tensor = getattr(self, name)
        return x[:, first:], 0 if len(x) == 1 else x.stride(0)


def _placed(q_pos: Tensor, block: int, stride: int) -> Located:
    q_pos = q_pos.contiguous()
    rows, tokens = q_pos.shape
    blocks, tiles = tokens // block, block // stride
    strips = -(-blocks * tiles // ROWS)
    sizes = [rows * n for n in (tokens, blocks * tiles, strips, 1)]
    parts = torch.full((sum(sizes),), -1, dtype=torch.int32, device=q_pos.device).split(sizes)
    places = Located(*(x.view(rows, -1) for x in parts))
    _places[(blocks, rows)](
        q_pos, tokens, *parts, blocks, strips, block, stride, tiles, ROWS=ROWS, SIZE=triton.next_power_of_2(block)
    )
    return places


def _tile_of(device: torch.device) -> tuple[int, dict[str, int]]:
    """Tiles of keys of a step, and how the product is compiled; TILED: the device copies tiles by itself."""
    if shared_of(device) < LARGE:
        return 128, {"TILED": False, "STAGES": 3, "num_warps": 8}
    return 256, {"TILED": True, "STAGES": 4, "num_warps": 8}


@torch.no_grad()
def run(
    q: Tensor, k: Tensor | Packed, q_pos: Tensor, block: int, stride: int, scale: float, causal: bool, rounded: str = ""
) -> Tensor:
    """`ops.score_antidiagonal`."""
    q = q if q.stride(3) == 1 else q.contiguous()
    (rows, heads, tokens, dim), (kv_heads, stored) = q.shape, k.shape[1:3]
    blocks, count, tiles, columns = -(-stored // block), tokens // block, block // stride, -(-stored // stride)
    depth = -(-stride * dim // DEPTH) * DEPTH
    out = torch.empty(rows, heads, count, blocks, device=q.device)
    with on(q.device):
        places = _placed(q_pos, block, stride)
        keys = _side_by_side(q, rows * kv_heads * columns, depth, stride)
        _put_keys[(triton.cdiv(columns * stride, TOKENS), kv_heads, rows)](
            rows_of(k), *places.of("last"), keys, stored, columns, stride, depth,
            DIM=dim, WIDTH=width_of(dim, bits_of(k)), BITS=bits_of(k), CAUSAL=causal, TOKENS=TOKENS,
        )  # fmt: skip
        size = max(1, SUMS // (rows * heads * blocks * ROWS)) * ROWS
        for first in range(0, count * tiles, size):
            some = min(size, count * tiles - first)
            asked = _side_by_side(q, rows * heads * some, depth, stride)
            _put_queries[(triton.cdiv(some * stride, TOKENS), heads, rows)](
                (q, *q.stride()[:3]), *places.of("source"), asked, first * stride, some, stride, depth,
                DIM=dim, WIDTH=width_of(dim), TOKENS=TOKENS,
            )  # fmt: skip
            sums = torch.empty(rows, heads, some, blocks, device=q.device)
            _multiply(asked, keys, sums, places, first, columns, tiles, kv_heads, scale / stride, causal)
            _shares[(some // tiles, heads, rows)](
                sums, *places.of("tile", first), out, count, some, first // tiles, blocks,
                TILES=tiles, BLOCKS=BLOCKS, CAUSAL=causal,
            )  # fmt: skip
    return out


def _side_by_side(q: Tensor, rows: int, depth: int, stride: int) -> Tensor:
    """Room for tiles, `[rows, depth]`; zero where no token is put."""
    return (q.new_zeros if depth > stride * q.shape[3] else q.new_empty)(rows, depth)


def _multiply(
    asked: Tensor, keys: Tensor, sums: Tensor, places: Located, first: int, columns: int, tiles: int, kv_heads: int,
    factor: float, causal: bool,
) -> None:  # fmt: skip
    """Into `sums`, of tiles of queries from `first` on."""
    rows, heads, count, blocks = sums.shape
    strips, (width, compiled) = triton.cdiv(count, ROWS), _tile_of(sums.device)
    bunch, steps = min(BUNCH, triton.next_power_of_2(strips)), triton.cdiv(columns, width)
    group, depth = heads // kv_heads, asked.shape[1]
    tables: list[Any] = [asked, keys]
    if compiled["TILED"]:
        tables = [TensorDescriptor(x, list(x.shape), [depth, 1], [n, DEPTH]) for x, n in ((asked, ROWS), (keys, width))]
    _product[(group * bunch * steps * triton.cdiv(strips, bunch), kv_heads, rows)](
        *tables, sums, *places.of("tile", first), *places.of("reach", first // ROWS), count, columns, blocks, depth,
        group, strips, bunch, factor * LOG2_E.value, BM=ROWS, BN=width, BK=DEPTH, TILES=tiles,
        CAUSAL=causal, **compiled,
    )  # fmt: skip
