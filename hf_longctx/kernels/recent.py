"""The operations over two stores of the same tokens: their contracts."""

from __future__ import annotations

from torch import Tensor

from . import dispatch
from .types import Logits, Packed, Visibility


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
    """Attention to two stores of the same tokens: of each query to the far ones in one, to the near ones in the other.

    Args:
        q: `[B, Hq, T, D]`.
        k: `[B, Hkv, S, D]`, read at a distance of `recent` tokens or more.
        v: `[B, Hkv, S, Dv]`, likewise.
        near_k: `[B, Hkv, S', D]`, read at smaller distances, the query's own place included.
        near_v: `[B, Hkv, S', Dv]`, likewise.
        logits: from products to logits.
        see: positions of queries, and of `k`; no sinks and no window. Without `q_pos` both stores have the queries' own
            tokens last, in their order.
        near_pos: `[B or 1, S']`, int64, positions of `near_k`, -1 for an empty column; None: columns are positions.
        recent: tokens, above 0.

    Returns:
        `[B, Hq, T, Dv]`, dtype of q; zero where a query sees nothing.
    """
    out: Tensor = dispatch.call("attend_recent", q, k, v, near_k, near_v, logits, see, near_pos, recent)
    return out


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
    """One token a row: store it in both stores, as `append_pages` does, and attend, as `attend_recent` does.

    Args:
        q: `[B, Hq, 1, D]`.
        k: `[B, Hkv, 1, D]`.
        v: `[B, Hkv, 1, Dv]`.
        far_k: `[B, Hkv, C, D]`, where position `p` has column `p`.
        far_v: `[B, Hkv, C, Dv]`, likewise.
        near_k: `[B, Hkv, C', D]`, where position `p` has column `p % ring`.
        near_v: `[B, Hkv, C', Dv]`, likewise.
        ring: slots that go round, at least `recent`.
        logits: from products to logits.
        see: `q_pos`, `[B or 1, 1]`, says where the tokens stand; there is no `k_pos`, and neither sinks nor a window.
        near_pos: as in `attend_recent`, like the next one; once the token is stored.
        recent: tokens, above 0.
        columns: of the far store that are read, from the first one on.
        near_columns: of the near store, likewise.

    Returns:
        `[B, Hq, 1, Dv]`, dtype of q.
    """
    stores = (far_k, far_v, near_k, near_v)
    more = (near_pos, recent, columns, near_columns)
    out: Tensor = dispatch.call("step_recent", q, k, v, *stores, ring, logits, see, *more)
    return out
