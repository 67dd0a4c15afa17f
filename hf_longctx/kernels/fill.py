"""The operation that stores a prompt: its contract, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from . import dispatch
from .types import Packed


@dataclass(frozen=True)
class GroupFill:
    """Where a group of heads of a layer stores a prompt; all as in `append_pages`.

    Args:
        k: `[B, Hkv', C, D]`, the group's store.
        v: `[B, Hkv', C, Dv]`.
        sink: first tokens, which have slots of their own.
        ring: slots that go round beyond them; None: every token has a slot of its own.
        bounds: `[B, Hkv', M', 2, D]`, or None.
        sub: tokens of a sub-block.
        heads: `[Hkv']`, int32, which heads of the layer the group has; None: all of them, in their order.
    """

    k: Tensor | Packed
    v: Tensor | Packed
    sink: int
    ring: int | None
    bounds: Tensor | None
    sub: int
    heads: Tensor | None = None


def fill_pages(
    groups: Sequence[GroupFill],
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    first: int | None,
    read: Sequence[Tensor] = (),
    blank: bool = False,
) -> None:
    """Store many tokens of each row (a prompt) in groups of heads of a layer, in place, and say what is read of them.

    Args:
        groups: no two have a head in common.
        k: `[B, Hkv, T, D]`; cast to the dtype of a store, quantized where that is.
        v: `[B, Hkv, T, Dv]`, likewise.
        pos: `[B or 1, T]`, int64: of each row first the positions of its tokens, one after the other, then -1 for those
            that are not written. Of two tokens with one slot the later one stays.
        first: the first position, where all rows are alike and all tokens are written, and the host knows.
        read: tensors like k and v, of which the groups' heads take the values that their stores give for all T tokens;
            empty: nobody asks for them.
        blank: stores hold nothing, whatever their memory says: what is not written becomes 0, and bounds of sub-blocks
            without a key +inf and -inf. Rows begin at position 0.
    """
    dispatch.call("fill_pages", groups, k, v, pos, first, read, blank)
