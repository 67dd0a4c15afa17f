"""The operation over two stores of the same tokens: its contract."""

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
