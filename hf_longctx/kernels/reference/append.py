"""Writing fresh tokens into a store."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..types import Packed
from ..wide import widened
from .kv import encode_kv, read


def append(store: Tensor, fresh: Tensor, slots: Tensor | int, written: Tensor | None) -> None:
    """The definition of `ops.append`."""
    fresh = fresh.detach().to(store.dtype)
    if isinstance(slots, int):
        into, fresh = widened(store[:, :, slots : slots + fresh.shape[2]], fresh)
        into.copy_(fresh)
        return
    index = _index(fresh, slots)
    if written is not None:
        fresh = torch.where(written[:, None, :, None], fresh, store[index])
    store[index] = fresh


def _index(x: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of columns `[B, N]` in all rows and heads of `[B, H, ...]`; on the CPU `scatter_` is a thousand times slower."""
    row, head = (torch.arange(n, device=columns.device) for n in x.shape[:2])
    return row[:, None, None], head[:, None], columns[:, None]


@torch.no_grad()
def append_pages(
    k_store: Tensor | Packed,
    v_store: Tensor | Packed,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    sink: int,
    ring: int | None,
    bounds: Tensor | None,
    sub: int,
    first: int | None,
) -> None:
    """The definition of `ops.append_pages`."""
    pairs = [pair for store, x in ((k_store, k), (v_store, v)) for pair in _fresh(store, x)]
    if first is None:
        pos, last, source = _written(pos)
        slots = _slots(pos.clamp(min=0), sink, ring).expand(k.shape[0], -1)
        for store, x in pairs:
            index = source[:, None, :, None].expand(x.shape)
            append(store, x.gather(2, index), slots, pos >= 0)
        if bounds is not None:
            _bound(k_store, bounds, pos, last, sub)
        return
    end = first + k.shape[2]
    for start, stop in _runs(first, end, sink, ring):
        slot = start if ring is None or start < sink else sink + (start - sink) % ring
        for store, x in pairs:
            append(store, x[:, :, start - first : stop - first], slot, None)
    if bounds is not None:
        for entry in range(first // sub, -(-end // sub)):
            stored = read(k_store, (slice(None), slice(None), slice(entry * sub, min(end, (entry + 1) * sub))))
            bounds[:, :, entry, 0], bounds[:, :, entry, 1] = stored.amin(2), stored.amax(2)


def _fresh(store: Tensor | Packed, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The tensors of a store, and what is written into each."""
    if isinstance(store, Tensor):
        return [(store, x)]
    return list(zip(store.tensors, encode_kv(x.to(store.dtype), store.bits).tensors, strict=True))


def _slots(pos: Tensor, sink: int, ring: int | None) -> Tensor:
    return pos if ring is None else torch.where(pos < sink, pos, sink + (pos - sink) % ring)


def _runs(first: int, end: int, sink: int, ring: int | None) -> list[tuple[int, int]]:
    """Positions `first` to `end - 1` in runs whose slots lie side by side."""
    turns = () if ring is None else range(sink, end, ring)
    cuts = sorted({first, end, *(p for p in turns if first < p < end)})
    return list(pairwise(cuts))


def _written(pos: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For tokens that are not written the last one that is, so that to write them too changes nothing.

    Args:
        pos: `[B or 1, T]`.

    Returns:
        `[B or 1, T]`, positions, -1 only in rows where nothing is written; `[B or 1, 1]`, the last of them; and
        `[B or 1, T]`, which token stands there.
    """
    last, at = pos.max(1, keepdim=True)
    there, own = pos >= 0, torch.arange(pos.shape[1], device=pos.device)
    return torch.where(there, pos, last), last, torch.where(there, own, at)


def _bound(keys: Tensor | Packed, bounds: Tensor, pos: Tensor, last: Tensor, sub: int) -> None:
    """Make the bounds anew of the sub-blocks that hold positions `pos`, out of keys up to `last`."""
    rows, heads, dim = keys.shape[0], keys.shape[1], keys.shape[3]
    entries = (pos.clamp(min=0) // sub).expand(rows, -1)
    places = entries[..., None] * sub + torch.arange(sub, device=pos.device)
    filled = places <= last[..., None]
    columns = torch.where(filled, places, 0).flatten(1)
    stored = read(keys, _index(bounds, columns)).view(rows, heads, -1, sub, dim)
    missing = ~filled[:, None, ..., None]
    least = stored.masked_fill(missing, float("inf")).amin(3)
    made = torch.stack((least, stored.masked_fill(missing, float("-inf")).amax(3)), 3)
    index = _index(bounds, entries)
    bounds[index] = torch.where((last >= 0)[:, None, :, None, None], made, bounds[index])
