"""Attention of some of a layer's query heads."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from ..types import Logits, Packed, Selection, Turns, Visibility
from ..wide import picked, widened


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
    """The definition of `ops.attend_heads`, by whatever backend is fastest at `attend_blocks`."""
    own: Tensor = dispatch.call("attend_blocks", picked(q, 1, heads), k, v, logits, see, turns, selection)
    into, part = widened(out, own)
    into.index_copy_(1, heads.long(), part)
