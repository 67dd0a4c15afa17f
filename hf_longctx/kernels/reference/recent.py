"""Attention to two stores of the same tokens: near keys in one, far keys in the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import dispatch
from ..types import Packed
from .attend import values_of
from .kv import first_columns
from .weigh import LOGITS_PER_BLOCK, average, empty_out, join, positions, products, weigh_products

if TYPE_CHECKING:
    from ..types import Logits, Visibility


@dataclass(frozen=True)
class Part:
    """Some queries, and all that they read.

    Args:
        rows: of the queries.
        k: `[B, Hkv, N, D]`, of both stores.
        v: `[B, Hkv, N, Dv]`, likewise.
        distance: `[B or 1, T', N]`, int64, from the key to the query.
        seen: `[B or 1, T', N]`, bool.
    """

    rows: slice
    k: Tensor
    v: Tensor
    distance: Tensor
    seen: Tensor


def parts(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    near_k: Tensor,
    near_v: Tensor,
    see: Visibility,
    near_pos: Tensor | None,
    recent: int,
) -> Iterator[Part]:
    """Block of queries after block of queries; arguments as `ops.attend_recent`."""
    k, v = values_of(k), values_of(v)
    tokens, stored, close = q.shape[2], k.shape[2], near_k.shape[2]
    q_pos, k_pos = positions(see, tokens, stored, q.device)
    near_pos = torch.arange(close, device=q.device)[None] if near_pos is None else near_pos
    size = max(16, min(512, LOGITS_PER_BLOCK // max(1, q.shape[0] * q.shape[1] * (stored + recent))) // 16 * 16)
    for first in range(0, tokens, size):
        rows = slice(first, min(first + size, tokens))
        far, near = slice(0, stored), slice(0, close)
        if see.q_pos is None:  # in order: what is too far, or too near, for all of them is left out
            end, last = (there - tokens + rows.stop for there in (stored, close))
            far, near = slice(0, max(0, end - recent)), slice(max(0, last - size - recent), last)
        distances = [q_pos[:, rows, None] - at[:, None] for at in (k_pos[:, far], near_pos[:, near])]
        there = [(at >= 0)[:, None] for at in (k_pos[:, far], near_pos[:, near])]
        seen = [there[0] & (distances[0] >= recent), there[1] & (distances[1] >= 0) & (distances[1] < recent)]
        yield Part(
            rows,
            torch.cat((k[:, :, far], near_k[:, :, near]), 2),
            torch.cat((v[:, :, far], near_v[:, :, near]), 2),
            _joined(*distances),
            _joined(*seen),
        )


def _joined(a: Tensor, b: Tensor) -> Tensor:
    """`[B or 1, T, N]` of two, of which one may have all rows."""
    rows = max(len(a), len(b))
    return torch.cat((a.expand(rows, -1, -1), b.expand(rows, -1, -1)), 2)


def attend_recent(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    near_k: Tensor,
    near_v: Tensor,
    logits: Logits,
    see: Visibility,
    near_pos: Tensor | None,
    recent: int,
) -> Tensor:
    """The definition of `ops.attend_recent`."""

    def read(part: Part) -> Tensor:
        x = products(q[:, :, part.rows], part.k, logits.scale)
        distance = None if logits.slopes is None else -part.distance[:, None, None]
        return average(*weigh_products(x, logits, distance, ~part.seen[:, None, None]), part.v, q.dtype)

    found = parts(q, k, v, near_k, near_v, see, near_pos, recent)
    return join(((part.rows, read(part)) for part in found), empty_out(q, v.shape[3]))


def step_recent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_k: Tensor | Packed,
    far_v: Tensor | Packed,
    near_k: Tensor,
    near_v: Tensor,
    ring: int,
    logits: Logits,
    see: Visibility,
    near_pos: Tensor | None,
    recent: int,
    columns: int,
    near_columns: int,
) -> Tensor:
    """The definition of `ops.step_recent`: the operations that it is made of, each on the backend that takes it."""
    dispatch.call("append_pages", far_k, far_v, k, v, see.q_pos, 0, None, None, 1, None)
    dispatch.call("append_pages", near_k, near_v, k, v, see.q_pos, 0, ring, None, 1, None)
    far = (first_columns(x, columns) for x in (far_k, far_v))
    near = (x[:, :, :near_columns] for x in (near_k, near_v))
    out: Tensor = dispatch.call("attend_recent", q, *far, *near, logits, see, near_pos, recent)
    return out
