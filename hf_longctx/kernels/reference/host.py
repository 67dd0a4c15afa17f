"""Blocks of keys and values between the device and host memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import HostBlocks, Packed, Places


def bring_blocks(
    k: Tensor | Packed,
    v: Tensor | Packed,
    host: HostBlocks,
    ids: Tensor,
    lengths: Tensor,
    pool: Tensor,
    counts: Tensor,
    places: Places,
) -> Tensor:
    """The definition of `ops.bring_blocks`; waits for the device, once more for each segment that it reads."""
    rows, heads, _, most = pool.shape
    spots, blocks = pool.long().unbind(2)
    wanted = ids.long().expand(rows, heads, -1, -1)[:, :, 0]
    far = places.is_far(wanted, lengths[:, None, None])
    assert int(far.sum(-1).amax()) <= most, "more blocks at once than the pool has places"
    same = (wanted[..., None] == blocks[:, :, None]) & far[..., None]  # [B, H, K, P]
    there, idle = same.any(-1), ~same.any(-2)
    missing = far & ~there
    needed = missing.sum(-1, keepdim=True)
    oldest = spots.gather(-1, (~idle).to(torch.uint8).argsort(dim=-1, stable=True))
    taken = oldest.gather(-1, (missing.cumsum(-1) - 1).clamp(min=0))
    spot = torch.where(there, (same * spots[:, :, None]).sum(-1), taken)
    left = idle & (idle.cumsum(-1) > needed)
    order = (~torch.cat((left, far), -1)).to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
    pool[:, :, 0] = torch.cat((spots, spot), -1).gather(-1, order)
    pool[:, :, 1] = torch.cat((blocks, wanted), -1).gather(-1, order)
    counts += torch.stack((there.sum(), missing.sum()))
    pages = torch.where(far, places.sinks + places.tail + spot, places.page(wanted))
    row, head, place = missing.nonzero(as_tuple=True)
    _read(k, v, host, row, head, wanted[row, head, place], pages[row, head, place], places)
    return torch.where(wanted < 0, -1, pages)[:, :, None].to(torch.int32)


def copy_blocks(
    k: Tensor | Packed,
    v: Tensor | Packed,
    host: HostBlocks,
    first: Tensor,
    last: Tensor,
    most: int,
    places: Places,
    out: bool,
) -> None:
    """The definition of `ops.copy_blocks`; waits likewise."""
    rows, heads = k.shape[:2]
    ids = (first[:, None] + torch.arange(most, device=first.device)).expand(rows, -1)
    row, number = (ids < last[:, None]).nonzero(as_tuple=True)
    block = ids[row, number].repeat_interleave(heads)
    head = torch.arange(heads, device=row.device).repeat(len(row))
    move = _write if out else _read
    move(k, v, host, row.repeat_interleave(heads), head, block, places.page(block), places)


def _read(
    k: Tensor | Packed,
    v: Tensor | Packed,
    host: HostBlocks,
    rows: Tensor,
    heads: Tensor,
    ids: Tensor,
    pages: Tensor,
    places: Places,
) -> None:
    """Copy blocks, `[n]` each, out of host memory into pages of keys and values."""
    if not len(ids):
        return
    found = torch.empty(len(ids), host.segments[0].shape[3], dtype=torch.uint8)
    for here, segment, lines in _segments(host, rows, heads, ids):
        found.index_copy_(0, here, segment.index_select(0, lines))
    targets = places.paged(k, v)
    sizes = [x.shape[3] * x.itemsize for x in targets]
    parts = torch.split_with_sizes(found.to(rows.device), sizes, -1)
    for target, part in zip(targets, parts, strict=True):
        target.flatten(0, 2).index_copy_(0, _lines(target, rows, heads, pages), part.view(target.dtype))


def _write(
    k: Tensor | Packed,
    v: Tensor | Packed,
    host: HostBlocks,
    rows: Tensor,
    heads: Tensor,
    ids: Tensor,
    pages: Tensor,
    places: Places,
) -> None:
    """Copy blocks, `[n]` each, from pages of keys and values into host memory."""
    if not len(ids):
        return
    sources = places.paged(k, v)
    parts = [x.flatten(0, 2).index_select(0, _lines(x, rows, heads, pages)).view(torch.uint8) for x in sources]
    joined = torch.cat(parts, -1).cpu()
    for here, segment, lines in _segments(host, rows, heads, ids):
        segment.index_copy_(0, lines, joined.index_select(0, here))


def _lines(x: Tensor, rows: Tensor, heads: Tensor, places: Tensor) -> Tensor:
    """Places of `[B, H, P, ...]` among all of them."""
    return (rows * x.shape[1] + heads) * x.shape[2] + places


def _segments(host: HostBlocks, rows: Tensor, heads: Tensor, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each segment with some of the blocks: which these are, its lines of bytes, and on which they lie."""
    each = host.segments[0].shape[2]
    number, lines = (ids // each).cpu(), _lines(host.segments[0], rows, heads, ids % each).cpu()
    found = []
    for index in sorted(set(number.tolist())):
        here = (number == index).nonzero()[:, 0]
        found.append((here, host.segments[index].flatten(0, 2), lines[here]))
    return found
