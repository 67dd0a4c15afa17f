"""Tiles of the text, each with its tokens side by side: as they are, or rounded to 8 bits as XAttention's scores ask.

What a channel loses goes to the same one of the token 256 / D further on, which stands 256 numbers further on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Packed
from .arguments import bits_of, rows_of, width_of
from .rows import nearest, nearest_float
from .tiles import head_of, put, queries, read

ROWS = 128
"""Tiles of queries of a strip."""
TOKENS = 64
"""That a program puts side by side at a time."""
DEPTH = {"": 64, "fp8": 128, "int8": 128}
"""Numbers of tiles are filled up with zeros to a multiple of so many."""
MOST = {"fp8": 448.0, "int8": 127.0}
"""The largest number of 8 bits."""
CHUNK, EACH = 256, 4
"""Numbers of a tile, and tiles, that a program rounds at a time."""
_LIKE = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


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


@triton.jit
def _numbers(
    x, source, tile, at, there, stride, DIM: tl.constexpr, BITS: tl.constexpr, QUERIES: tl.constexpr, LIKE: tl.constexpr
):
    """Of tiles `[R]`, the numbers at these places `[C]`, float32; zero where there is no token, or no such place.

    source: of queries, where they stand, -1 for none; of keys, the last that there is.
    """
    token, channel = at // DIM, at % DIM
    mask = there[:, None] & (token < stride)[None, :]
    if QUERIES:
        row = tl.load(source + (tile * stride + stride - 1)[:, None] - token[None, :], mask=mask, other=-1)
        mask &= row >= 0
    else:
        row = (tile * stride)[:, None] + token[None, :]
        mask &= row <= source
    row = row.to(tl.int64)
    HALVES: tl.constexpr = 2 if BITS == 4 else 1
    found = tl.load(x[0] + row * x[3] + (channel // HALVES)[None, :], mask=mask, other=0)
    if BITS > 0:
        if BITS == 4:
            found = found >> (channel % 2 * 4).to(tl.uint8)[None, :] & 15
        scale = tl.load(x[1] + row * x[4], mask=mask, other=0.0).to(tl.float32)
        zero = tl.load(x[2] + row * x[4], mask=mask, other=0.0).to(tl.float32)
        found = ((found.to(tl.float32) - zero) * scale).to(LIKE)
    return found.to(tl.float32)


@triton.jit(do_not_specialize=["first", "source_b", "count", "stored", "stride"])
def _round(
    x, source, source_b, first, out, sizes, count, stored, stride, depth, MOST: tl.constexpr, LIKE: tl.constexpr,
    DIM: tl.constexpr, BITS: tl.constexpr, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, FLOATS: tl.constexpr,
    CARRIES: tl.constexpr, CHUNK: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Tiles in 8 bits, and what a unit of each is worth: NaN where a number is not finite."""
    head, batch = tl.program_id(1), tl.program_id(2)
    tile = tl.program_id(0) * EACH + tl.arange(0, EACH)
    there, rows = tile < count, head_of(x, batch, head)
    if QUERIES:
        known = source + batch.to(tl.int64) * source_b + first
    else:
        known = stored - 1
        if CAUSAL:
            known = tl.minimum(known, tl.load(source + batch * source_b))
    some = tl.arange(0, CHUNK)
    largest, broken = tl.zeros((EACH, CHUNK), tl.float32), tl.zeros((EACH, CHUNK), tl.int32)
    for begin in range(0, stride * DIM, CHUNK):
        size = tl.abs(_numbers(rows, known, tile, begin + some, there, stride, DIM, BITS, QUERIES, LIKE))
        broken |= (size < float("inf")).to(tl.int32) ^ 1  # NaN is not
        largest = tl.maximum(largest, size)
    most, finite = tl.maximum(tl.max(largest, 1), 1e-20), tl.max(broken, 1) == 0
    line = (batch * tl.num_programs(1) + head).to(tl.int64) * count + tile
    tl.store(sizes + line, tl.where(finite, tl.div_rn(most, MOST), float("nan")), mask=there)
    factor = tl.where(finite, tl.div_rn(tl.zeros((EACH,), tl.float32) + MOST, most), 0.0)
    lost = tl.zeros((EACH, CHUNK), tl.float32)
    for begin in range(0, stride * DIM, CHUNK):
        wanted = _numbers(rows, known, tile, begin + some, there, stride, DIM, BITS, QUERIES, LIKE)
        wanted = tl.where(finite[:, None], wanted, 0.0) * factor[:, None] + lost
        eight = tl.minimum(tl.maximum(wanted, -MOST), MOST)
        worth = nearest_float(eight) if FLOATS else nearest(eight)
        if CARRIES:
            lost = wanted - worth
        to = out + line[:, None] * depth + (begin + some)[None, :]
        tl.store(to, worth.to(out.dtype.element_ty), mask=there[:, None] & (begin + some < stride * DIM)[None, :])


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


def placed(q_pos: Tensor, block: int, stride: int) -> Located:
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


@dataclass(frozen=True)
class Laid:
    """Tiles side by side.

    Args:
        numbers: `[tiles, depth]`, of 16 bits, e4m3 or int8.
        sizes: `[tiles]`, float32, what a unit of each is worth; None of 16 bits.
    """

    numbers: Tensor
    sizes: Tensor | None


def depth_of(stride: int, dim: int, rounded: str) -> int:
    """Numbers of a tile and the zeros after them."""
    return -(-stride * dim // DEPTH[rounded]) * DEPTH[rounded]


def key_tiles(k: Tensor | Packed, places: Located, stride: int, causal: bool, rounded: str) -> Laid:
    """All keys, `[B * Hkv * tiles, depth]`."""
    rows, kv_heads, stored, dim = k.shape
    columns = triton.cdiv(stored, stride)
    made = _room(k, rows * kv_heads * columns, stride, dim, rounded)
    depth = made.numbers.shape[1]
    if rounded:
        _rounded(k, *places.of("last"), 0, made, columns, stored, stride, causal, False, rounded)
        return made
    _put_keys[(triton.cdiv(columns * stride, TOKENS), kv_heads, rows)](
        rows_of(k), *places.of("last"), made.numbers, stored, columns, stride, depth,
        DIM=dim, WIDTH=width_of(dim, bits_of(k)), BITS=bits_of(k), CAUSAL=causal, TOKENS=TOKENS,
    )  # fmt: skip
    return made


def query_tiles(q: Tensor, places: Located, first: int, some: int, stride: int, rounded: str) -> Laid:
    """So many tiles of queries, `[B * Hq * some, depth]`."""
    rows, heads, _, dim = q.shape
    made = _room(q, rows * heads * some, stride, dim, rounded)
    depth = made.numbers.shape[1]
    if rounded:
        _rounded(q, *places.of("source"), first * stride, made, some, 0, stride, True, True, rounded)
        return made
    _put_queries[(triton.cdiv(some * stride, TOKENS), heads, rows)](
        (q, *q.stride()[:3]), *places.of("source"), made.numbers, first * stride, some, stride, depth,
        DIM=dim, WIDTH=width_of(dim), TOKENS=TOKENS,
    )  # fmt: skip
    return made


def _room(x: Tensor | Packed, count: int, stride: int, dim: int, rounded: str) -> Laid:
    """For so many tiles; zero where no token is put."""
    depth, dtype = depth_of(stride, dim, rounded), torch.int8 if rounded else x.dtype
    make = torch.zeros if depth > stride * dim else torch.empty
    numbers = make(count, depth, dtype=dtype, device=x.device)
    if not rounded:
        return Laid(numbers, None)
    sizes = torch.empty(count, dtype=torch.float32, device=x.device)
    return Laid(numbers.view(torch.float8_e4m3fn) if rounded == "fp8" else numbers, sizes)


def _rounded(
    x: Tensor | Packed, source: Tensor, source_b: int, first: int, to: Laid, count: int, stored: int, stride: int,
    causal: bool, asks: bool, rounded: str,
) -> None:  # fmt: skip
    rows, heads, _, dim = x.shape
    _round[(triton.cdiv(count, EACH), heads, rows)](
        rows_of(x), source, source_b, first, to.numbers, to.sizes, count, stored, stride, to.numbers.shape[1],
        MOST=MOST[rounded], LIKE=_LIKE[x.dtype], DIM=dim, BITS=bits_of(x), QUERIES=asks, CAUSAL=causal,
        FLOATS=rounded == "fp8", CARRIES=CHUNK % dim == 0, CHUNK=CHUNK, EACH=EACH,
        enable_fp_fusion=False,  # a product is rounded before the sum
    )  # fmt: skip
