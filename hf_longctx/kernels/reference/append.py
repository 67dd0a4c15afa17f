"""Writing fresh tokens into a store."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..types import Packed, parts
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
    fresh = [encoded(store, x) for store, x in ((k_store, k), (v_store, v))]
    put((k_store, v_store), fresh, pos, sink, ring, first)
    if bounds is None:
        return
    if first is None:
        pos, last, _ = _written(pos)
        _bound(k_store, bounds, pos, last, sub)
    else:
        bound_run(k_store, bounds, first, first + k.shape[2], sub)


def encoded(store: Tensor | Packed, x: Tensor) -> Tensor | Packed:
    """Fresh values in the format of a store."""
    x = x.to(store.dtype)
    return x if isinstance(store, Tensor) else encode_kv(x, store.bits)


def put(
    stores: Sequence[Tensor | Packed],
    fresh: Sequence[Tensor | Packed],
    pos: Tensor,
    sink: int,
    ring: int | None,
    first: int | None,
) -> None:
    """Write tokens where they belong; arguments as `ops.append_pages`, `fresh` in the formats of the stores."""
    pairs = [pair for store, x in zip(stores, fresh, strict=True) for pair in zip(parts(store), parts(x), strict=True)]
    tokens = fresh[0].shape[2]
    if first is None:
        pos, _, source = _written(pos)
        slots = _slots(pos.clamp(min=0), sink, ring).expand(fresh[0].shape[0], -1)
        for store, x in pairs:
            index = source[:, None, :, None].expand(x.shape)
            append(store, x.gather(2, index), slots, pos >= 0)
        return
    for start, stop in _runs(first, first + tokens, sink, ring):
        slot = start if ring is None or start < sink else sink + (start - sink) % ring
        for store, x in pairs:
            append(store, x[:, :, start - first : stop - first], slot, None)


def bound_run(keys: Tensor | Packed, bounds: Tensor, first: int, end: int, sub: int) -> None:
    """Make the bounds anew of the sub-blocks that hold positions `first` to `end - 1`, of all rows."""
    start, whole = first // sub, max(first // sub, end // sub)
    if whole > start:
        stored = read(keys, (slice(None), slice(None), slice(start * sub, whole * sub)))
        stored = stored.reshape(*stored.shape[:2], whole - start, sub, stored.shape[3])
        bounds[:, :, start:whole, 0], bounds[:, :, start:whole, 1] = stored.amin(3), stored.amax(3)
    if end > whole * sub:
        stored = read(keys, (slice(None), slice(None), slice(whole * sub, end)))
        bounds[:, :, whole, 0], bounds[:, :, whole, 1] = stored.amin(2), stored.amax(2)


def _slots(pos: Tensor, sink: int, ring: int | None) -> Tensor:
    return pos if ring is None else torch.where(pos < sink, pos, sink + (pos - sink) % ring)


def _runs(first: int, end: int, sink: int, ring: int | None) -> list[tuple[int, int]]:
    """Positions `first` to `end - 1` in runs whose slots lie side by side; no slot comes twice."""
    if ring is None:
        return [(first, end)]
    start = max(first, sink, end - ring)
    cuts = sorted({start, end, *(p for p in range(sink, end, ring) if start < p < end)}) if start < end else []
    return [*([(first, min(sink, end))] if first < sink else []), *pairwise(cuts)]


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
    bound_entries(keys, bounds, pos.clamp(min=0) // sub, last, sub)


def bound_entries(keys: Tensor | Packed, bounds: Tensor, entries: Tensor, last: Tensor, sub: int) -> None:
    """Make the bounds of sub-blocks `entries` `[B or 1, N]` anew, of keys up to `last`; of none where that is -1."""
    rows, heads, dim = keys.shape[0], keys.shape[1], keys.shape[3]
    entries = entries.expand(rows, -1)
    places = entries[..., None] * sub + torch.arange(sub, device=last.device)
    filled = places <= last[..., None]
    columns = torch.where(filled, places, 0).flatten(1)
    stored = read(keys, _index(bounds, columns)).view(rows, heads, -1, sub, dim)
    missing = ~filled[:, None, ..., None]
    least = stored.masked_fill(missing, float("inf")).amin(3)
    made = torch.stack((least, stored.masked_fill(missing, float("-inf")).amax(3)), 3)
    index = _index(bounds, entries)
    bounds[index] = torch.where((last >= 0)[:, None, :, None, None], made, bounds[index])
