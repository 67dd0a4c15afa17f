"""Attention of some of a layer's query heads, among all of them: its contract, as in `ops`."""

from __future__ import annotations

from torch import Tensor

from . import dispatch
from .types import Logits, Packed, Selection, Turns, Visibility


def attend_heads(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None,
    heads: Tensor,
    out: Tensor,
) -> None:
    """`ops.attend_blocks` of the queries `q[:, heads]`, put into `out[:, heads]`; nothing is copied, where it can be.

    Args:
        q: `[B, Hq, T, D]`, of all heads.
        k: `[B, Hkv', S, D]`, of these heads, as the others up to `selection`.
        v: `[B, Hkv', S, Dv]`.
        logits: from products to logits.
        see: which keys each query sees.
        turns: how queries are turned.
        selection: which blocks are read; None: all.
        heads: `[Hq']`, int32, where the heads are among all.
        out: `[B, Hq, T, Dv]`, of all heads.
    """
    dispatch.call("attend_heads", q, k, v, logits, see, turns, selection, heads, out)
