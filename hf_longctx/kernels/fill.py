"""The operation that stores a prompt: its contract."""

from __future__ import annotations

from torch import Tensor

from . import dispatch
from .types import Packed


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
    first: int | None = None,
    heads: Tensor | None = None,
    read: tuple[Tensor, Tensor] | None = None,
    blank: bool = False,
) -> None:
    """Store many tokens of each row (a prompt), in place, and say what is then read of them: `append_pages` for prompts.

    Args:
        k_store: `[B, Hkv', C, D]`.
        v_store: `[B, Hkv', C, Dv]`.
        k: `[B, Hkv, T, D]`; cast to the store's dtype, quantized where the store is.
        v: `[B, Hkv, T, Dv]`, likewise.
        pos: `[B or 1, T]`, int64: of each row first the positions of its tokens, one after the other, then -1 for those
            that are not written. Of two tokens with one slot the later one stays.
        sink: as in `append_pages`, like `ring`.
        ring: tokens that go round; None: every token has a slot of its own.
        bounds: `[B, Hkv', M', 2, D]`, as in `append_pages`, like `sub`.
        sub: tokens of a sub-block.
        first: as in `append_pages`.
        heads: `[Hkv']`, int32, which heads of k and v are stored; None: all of them, in their order.
        read: tensors like k and v, of which those heads take the values that a store gives for all T tokens.
        blank: the store holds nothing, whatever its memory says: what is not written becomes 0, and bounds of
            sub-blocks without a key +inf and -inf. Rows begin at position 0.
    """
    dispatch.call("fill_pages", k_store, v_store, k, v, pos, sink, ring, bounds, sub, first, heads, read, blank)
