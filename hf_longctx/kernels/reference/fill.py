"""Storing a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..types import parts
from .append import bound_entries, bound_run, encoded, put
from .kv import decode_kv

if TYPE_CHECKING:
    from ..fill import GroupFill


@torch.no_grad()
def fill_pages(
    groups: Sequence[GroupFill],
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    first: int | None,
    read: Sequence[Tensor],
    blank: bool,
) -> None:
    """The definition of `ops.fill_pages`."""
    for group in groups:
        if blank:
            _clear(group)
        heads = None if group.heads is None else group.heads.long()
        own = (x if heads is None else x.index_select(1, heads) for x in (k, v))
        fresh = [encoded(store, x) for store, x in zip((group.k, group.v), own, strict=True)]
        for into, x in zip(read, fresh, strict=True) if read else ():
            values = (x if isinstance(x, Tensor) else decode_kv(x)).to(into.dtype)
            into[:, slice(None) if heads is None else heads] = values
        at, last = pos, pos.max(1, keepdim=True).values
        if group.ring is not None and first is None:
            at = torch.where((pos < group.sink) | (pos > last - group.ring), pos, -1)
        put((group.k, group.v), fresh, at, group.sink, group.ring, first)
        if group.bounds is None:
            continue
        if first is not None:
            bound_run(group.k, group.bounds, first, first + k.shape[2], group.sub)
            continue
        entries = pos[:, :1].clamp(min=0) // group.sub + torch.arange(k.shape[2] // group.sub + 2, device=pos.device)
        entries = torch.minimum(entries, last.clamp(min=0) // group.sub)
        bound_entries(group.k, group.bounds, entries, last, group.sub)


def _clear(group: GroupFill) -> None:
    for tensor in (*parts(group.k), *parts(group.v)):
        tensor.zero_()
    if group.bounds is not None:
        group.bounds[:, :, :, 0], group.bounds[:, :, :, 1] = float("inf"), float("-inf")
