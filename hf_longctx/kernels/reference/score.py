"""How much each block of keys matters to each block of queries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..types import Packed
from .kv import read
from .weigh import LOGITS_PER_BLOCK


def score_pages(q: Tensor, summary: Tensor, subs: int, share: str) -> Tensor:
    """The definition of `ops.score_pages`; bounds in one product: each channel's sign says which bound it meets."""
    rows, heads, tokens, _ = q.shape
    kv_heads, entries, vectors = summary.shape[1:4]
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    if vectors == 2:
        q = torch.cat((q.clamp(max=0), q.clamp(min=0)), -1)
    x = q.reshape(rows, kv_heads, -1, q.shape[3]) @ summary.to(q.dtype).flatten(3).transpose(2, 3)
    if vectors == 2:
        empty = summary[:, :, :, 0, 0] > summary[:, :, :, 1, 0]
        x = x.masked_fill_(empty[:, :, None], float("-inf"))
    x = pad(x.view(rows, kv_heads, -1, tokens, entries), (0, -entries % subs), value=float("-inf"))
    x = torch.unflatten(x, -1, (-1, subs)).amax(-1)
    if share == "q_head":
        return x.reshape(rows, heads, tokens, -1)
    if share == "all":
        x = x.reshape(rows, 1, heads, tokens, -1)
    return x.amax(2) if vectors == 2 else x.mean(2)


@torch.no_grad()
def score_antidiagonal(
    q: Tensor, k: Tensor | Packed, q_pos: Tensor, block: int, stride: int, scale: float, causal: bool, rounded: str = ""
) -> Tensor:
    """The definition of `ops.score_antidiagonal`; as many blocks of queries at a time as memory allows."""
    rows, heads, kv_heads, stored = *q.shape[:2], *k.shape[1:3]
    tiles, columns = block // stride, -(-stored // stride)
    places = q_pos.view(q_pos.shape[0], -1, block)
    count = places.shape[1]
    work = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(rows, heads, count, -(-stored // block), dtype=work, device=q.device)
    last = q_pos.amax(1) if causal else torch.full_like(q_pos[:, 0], stored - 1)
    ends = places.amax((0, 2)).tolist()  # one wait for the device, and half of the products are spared
    size = max(1, LOGITS_PER_BLOCK // max(1, rows * heads * tiles * columns))
    for first in range(0, count, size):
        part = slice(first, min(first + size, count))
        end = min(columns, max(ends[part]) // stride + 1) if causal else columns
        if end < 1:
            continue
        queries, row_tile = query_tiles(q[:, :, first * block : part.stop * block], places[:, part], stride, work)
        grouped = _rounded(queries, rounded, stride).reshape(rows, kv_heads, -1, queries.shape[-1]) * (scale / stride)
        x = torch.empty(*grouped.shape[:3], end, dtype=work, device=q.device)
        for cols, keys in _key_tiles(k, last, stride, end, work):
            x[..., cols] = grouped @ _rounded(keys, rounded, stride).transpose(2, 3)
        shares = shares_of(x.view(rows, heads, -1, tiles, end), row_tile, causal)
        shares = torch.unflatten(pad(shares, (0, -end % tiles)), -1, (-1, tiles)).sum(-1)
        out[:, :, part, : shares.shape[-1]] = shares
    return out


def query_tiles(q: Tensor, places: Tensor, stride: int, work: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries of n blocks at their places, last first in each tile, side by side.

    Args:
        q: `[B, Hq, n * block, D]`.
        places: `[B or 1, n, block]`, int64, positions, -1 for none.
        stride: tokens of a tile.
        work: dtype.

    Returns:
        `[B, Hq, n * tiles, stride * D]`, and `[B or 1, n, tiles]`, int64: which tile of the text each is, -1 where none
        of its queries is there.
    """
    count, block = places.shape[1:]
    there = (places >= 0).flatten(1)[:, None, :, None]
    starts = torch.arange(count, device=q.device)[:, None] * block
    index = (starts + places.clamp(min=0) % block).flatten(1)[:, None, :, None].expand(q.shape[0], q.shape[1], -1, 1)
    fresh = q.to(work).masked_fill(~there, 0.0)
    placed = torch.zeros_like(fresh).scatter_add_(2, index.expand_as(fresh), fresh)  # at most one is not zero
    queries = torch.unflatten(placed, 2, (-1, stride)).flip(3).flatten(3)
    tile = torch.full((places.shape[0], count, block // stride), -1, device=q.device)
    return queries, tile.scatter_reduce_(2, places.clamp(min=0) % block // stride, places // stride, "amax")


def _key_tiles(
    k: Tensor | Packed, last: Tensor, stride: int, end: int, work: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Keys of some tiles at a time, side by side; zero after each row's last place, `[B or 1]`.

    Yields:
        Which tiles, and `[B, Hkv, tiles, stride * D]`.
    """
    size = max(1, LOGITS_PER_BLOCK // max(1, k.shape[0] * k.shape[1] * stride * k.shape[3]))
    for first in range(0, end, size):
        cols = slice(first, min(first + size, end))
        columns = slice(first * stride, min(cols.stop * stride, k.shape[2]))
        keys = read(k, (slice(None), slice(None), columns)).to(work)
        after = torch.arange(columns.start, columns.stop, device=keys.device) > last[:, None]
        keys = pad(keys.masked_fill(after[:, None, :, None], 0.0), (0, 0, 0, -keys.shape[2] % stride))
        yield cols, torch.unflatten(keys, 2, (-1, stride)).flatten(3)


def _rounded(x: Tensor, to: str, stride: int) -> Tensor:
    """Tiles `[..., stride * D]` as 8 bits hold them, each divided by a part of its largest channel; to: as in `ops`."""
    if not to:
        return x
    most = 448.0 if to == "fp8" else 127.0
    x32 = torch.unflatten(x.float(), -1, (stride, -1))  # whatever x is
    largest = x32.abs().amax((-2, -1), keepdim=True).clamp(min=1e-20)
    eight = x32 * (torch.full_like(largest, most) / largest)  # a number over a tensor would be rounded twice
    lost: list[Tensor] = []
    apart = 256 // x32.shape[-1] if 256 % x32.shape[-1] == 0 else stride
    for i in range(stride):
        wanted = eight[..., i, :]
        if i >= apart:
            wanted = wanted + lost[i - apart]
        near = wanted.clamp(-most, most)
        near = near.to(torch.float8_e4m3fn).float() if to == "fp8" else near.round()
        lost.append(wanted - near)
        eight[..., i, :] = near
    return (eight.to(x.dtype) * (largest / most)).flatten(-2)


def shares_of(x: Tensor, tile: Tensor, causal: bool) -> Tensor:
    """Softmax of each tile of queries, added up over a block's: `[B, Hq, n, tiles, C]` to `[B, Hq, n, C]`."""
    if causal:
        after = torch.arange(x.shape[-1], device=x.device) > tile[..., None]
        x = x.masked_fill_(after[:, None], float("-inf"))
    return x.softmax(-1).masked_fill_((tile < 0)[:, None, ..., None], 0.0).sum(3)
