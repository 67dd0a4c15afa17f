"""`ops.score_antidiagonal` in Triton: one product of tiles, of which only sums over blocks of keys are written.

Paper: XAttention (arXiv:2503.16428) section 2.1. Tiles of queries, the last query first, and tiles of keys are put side
by side; of their product the log-sum-exp of each tile of queries over each block of keys is kept, for some blocks of
queries at a time; these become shares, which are added up over the tiles of a block of queries. What is not seen of the
product is left out, and nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..types import Packed
from .arguments import LARGE, MOST, on, reject_stored, shared_of
from .text_tiles import DEPTH, ROWS, Laid, Located, key_tiles, placed, query_tiles
from .tiles import LOG2_E

SUMS = 1 << 26
"""Of tiles of queries over blocks of keys that are held at a time, in float32; one strip of tiles at least."""
BUNCH, BLOCKS = 8, 256
"""Strips that walk over the keys together, and blocks that a program makes shares of at a time."""
MOST_TILES, MOST_ROUNDED = 64, 1 << 16
"""Of a block; and numbers of a tile that is rounded: 32 bits hold a sum of 2^17 products."""
FLOATS_SINCE = (8, 9)
"""Capability that multiplies floats of 8 bits."""


@triton.jit(do_not_specialize=["tile", "tile_b", "reach", "reach_b", "count", "columns", "group", "strips", "bunch"])
def _product(
    asked, keys, asked_sizes, key_sizes, sums, tile, tile_b, reach, reach_b, count, columns, blocks, depth, group,
    strips, bunch, factor, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    CAUSAL: tl.constexpr, STAGES: tl.constexpr, TILED: tl.constexpr, WHOLE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Log2-sum-exp2 of BM tiles of queries over the blocks of BN tiles of keys; heads of a KV head walk together.

    WHOLE: numbers are. APART: of floats of 8 bits, so many products are summed up before they join the others, which a
    tensor core would add with few bits; None of others.
    """
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
    KIND: tl.constexpr = tl.int32 if WHOLE else tl.float32
    x = tl.zeros((BM, BN), KIND)
    if TILED:
        for i in tl.range(0, depth, BK, num_stages=STAGES):
            some, others = asked.load([first, i]), tl.trans(keys.load([begin, i]))
            x = tl.dot(some, others, x, max_num_imprecise_acc=APART, out_dtype=KIND)
    else:
        terms = tl.arange(0, BK)[None, :]
        row = first + tl.minimum(tl.arange(0, BM), count - 1 - strip * BM)
        column = begin + tl.minimum(tl.arange(0, BN), columns - 1 - step * BN)
        some = asked + row.to(tl.int64)[:, None] * depth + terms
        others = keys + column.to(tl.int64)[:, None] * depth + terms
        for _ in tl.range(0, depth, BK, num_stages=STAGES):
            x = tl.dot(tl.load(some), tl.trans(tl.load(others)), x, max_num_imprecise_acc=APART, out_dtype=KIND)
            some += BK
            others += BK
    row, column = strip * BM + tl.arange(0, BM), step * BN + tl.arange(0, BN)
    at = tl.load(tile + batch.to(tl.int64) * tile_b + row, mask=row < count, other=-1)
    if asked_sizes is not None:
        size = tl.load(asked_sizes + first + tl.arange(0, BM), mask=row < count, other=0.0)
        others_size = tl.load(key_sizes + begin + tl.arange(0, BN), mask=column < columns, other=0.0)
        x = x.to(tl.float32) * size[:, None] * others_size[None, :]
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
    if rounded and stride * q.shape[3] > MOST_ROUNDED:
        return f"rounds tiles of at most {MOST_ROUNDED} numbers"
    if rounded == "fp8" and q.is_cuda and torch.cuda.get_device_capability(q.device) < FLOATS_SINCE:
        return "multiplies floats of 8 bits from sm_89 on; whole numbers ('int8') everywhere"
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


def _tile_of(device: torch.device, rounded: str) -> tuple[int, dict[str, Any]]:
    """Tiles of keys of a step, and how the product is compiled; TILED: the device copies tiles by itself."""
    kind = {"WHOLE": rounded == "int8", "APART": DEPTH[rounded] if rounded == "fp8" else None, "num_warps": 8}
    if shared_of(device) < LARGE:
        return 128, {"TILED": False, "STAGES": 3, **kind}
    return 128 if rounded == "fp8" else 256, {"TILED": True, "STAGES": 4, **kind}  # of floats there are two sums


@torch.no_grad()
def run(
    q: Tensor, k: Tensor | Packed, q_pos: Tensor, block: int, stride: int, scale: float, causal: bool, rounded: str = ""
) -> Tensor:
    """`ops.score_antidiagonal`."""
    q = q if q.stride(3) == 1 else q.contiguous()
    (rows, heads, tokens, _), stored = q.shape, k.shape[2]
    blocks, count, tiles = -(-stored // block), tokens // block, block // stride
    out = torch.empty(rows, heads, count, blocks, device=q.device)
    with on(q.device):
        places = placed(q_pos, block, stride)
        keys = key_tiles(k, places, stride, causal, rounded)
        size = max(1, SUMS // (rows * heads * blocks * ROWS)) * ROWS
        for first in range(0, count * tiles, size):
            some = min(size, count * tiles - first)
            asked = query_tiles(q, places, first, some, stride, rounded)
            sums = torch.empty(rows, heads, some, blocks, device=q.device)
            _multiply(
                asked,
                keys,
                sums,
                places,
                first,
                -(-stored // stride),
                tiles,
                k.shape[1],
                scale / stride,
                causal,
                rounded,
            )
            _shares[(some // tiles, heads, rows)](
                sums, *places.of("tile", first), out, count, some, first // tiles, blocks,
                TILES=tiles, BLOCKS=BLOCKS, CAUSAL=causal,
            )  # fmt: skip
    return out


def _multiply(
    asked: Laid, keys: Laid, sums: Tensor, places: Located, first: int, columns: int, tiles: int, kv_heads: int,
    factor: float, causal: bool, rounded: str,
) -> None:  # fmt: skip
    """Into `sums`, of tiles of queries from `first` on."""
    rows, heads, count, blocks = sums.shape
    strips, (width, compiled), step = triton.cdiv(count, ROWS), _tile_of(sums.device, rounded), DEPTH[rounded]
    bunch, steps = min(BUNCH, triton.next_power_of_2(strips)), triton.cdiv(columns, width)
    group, depth = heads // kv_heads, asked.numbers.shape[1]
    tables: list[Any] = [asked.numbers, keys.numbers]
    if compiled["TILED"]:
        wide = zip(tables, (ROWS, width), strict=True)
        tables = [TensorDescriptor(x, list(x.shape), [depth, 1], [n, step]) for x, n in wide]
    _product[(group * bunch * steps * triton.cdiv(strips, bunch), kv_heads, rows)](
        *tables, asked.sizes, keys.sizes, sums, *places.of("tile", first), *places.of("reach", first // ROWS), count,
        columns, blocks, depth, group, strips, bunch, factor * LOG2_E.value, BM=ROWS, BN=width, BK=step, TILES=tiles,
        CAUSAL=causal, **compiled,
    )  # fmt: skip
