"""Storing a prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Packed, parts
from .append import bound_entries, bound_run, encoded, put
from .kv import decode_kv


@torch.no_grad()
def fill_pages(
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
    heads: Tensor | None,
    read: tuple[Tensor, Tensor] | None,
    blank: bool,
) -> None:
    """The definition of `ops.fill_pages`."""
    if blank:
        _clear(k_store, v_store, bounds)
    if heads is not None:
        k, v = (x.index_select(1, heads.long()) for x in (k, v))
    stores, fresh = (k_store, v_store), [encoded(store, x) for store, x in ((k_store, k), (v_store, v))]
    if read is not None:
        of = slice(None) if heads is None else heads.long()
        for into, x in zip(read, fresh, strict=True):
            into[:, of] = (x if isinstance(x, Tensor) else decode_kv(x)).to(into.dtype)
    last, begin = pos.max(1, keepdim=True).values, pos[:, :1]
    if ring is not None and first is None:
        pos = torch.where((pos < sink) | (pos > last - ring), pos, -1)
    put(stores, fresh, pos, sink, ring, first)
    if bounds is None:
        return
    if first is not None:
        bound_run(k_store, bounds, first, first + k.shape[2], sub)
        return
    entries = begin.clamp(min=0) // sub + torch.arange(k.shape[2] // sub + 2, device=pos.device)
    bound_entries(k_store, bounds, torch.minimum(entries, last.clamp(min=0) // sub), last, sub)


def _clear(k_store: Tensor | Packed, v_store: Tensor | Packed, bounds: Tensor | None) -> None:
    for tensor in (*parts(k_store), *parts(v_store)):
        tensor.zero_()
    if bounds is not None:
        bounds[:, :, :, 0], bounds[:, :, :, 1] = float("inf"), float("-inf")
