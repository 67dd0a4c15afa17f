"""A decode step of one token in all heads of a layer, as one operation; and the values that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from . import dispatch
from .types import Logits, Packed, Visibility


@dataclass(frozen=True)
class Choice:
    """How a group of heads chooses blocks: `score_pages`, then `pick_blocks`, so many of the best.

    Args:
        summary: as in `score_pages`, like the next two; `share` is not `q_head`.
        subs: sub-blocks of a block.
        share: which heads share a choice.
        low: `[B or 1, 1]`, int64, as in `pick_blocks`, like the rest. No block before it holds the step's token.
        high: `[B or 1, 1]`, int64.
        sink: blocks at the start.
        take: how many candidates.
        forced: an upper bound of the number of local blocks.
    """

    summary: Tensor
    subs: int
    share: str
    low: Tensor
    high: Tensor
    sink: int
    take: int
    forced: int

    @property
    def size(self) -> int:
        """K, places of a list: `min(M, sink + forced + take)`."""
        return min(-(-self.summary.shape[2] // self.subs), self.sink + self.forced + self.take)


@dataclass(frozen=True)
class GroupStep:
    """What one group of heads does in a decode step.

    Args:
        heads: KV heads of the layer that the group has, by their numbers.
        k: `[B, H', C, D]`, the group's store, as in `append_pages`, like the next five.
        v: `[B, H', C, Dv]`.
        sink: first tokens, which have slots of their own.
        ring: slots that go round beyond them, or None.
        bounds: `[B, H', M', 2, D]`, or None.
        sub: tokens of a sub-block.
        see: which keys the token sees; `q_pos` `[B or 1, 1]` says where it stands, and is where it is stored.
        columns: of the store, the first ones, that are read where blocks are not chosen; `see.k_pos` speaks of them.
        ids: `[B, Hs, 1, K]`, int32, contiguous, as in `Selection`: the blocks that are read, and `see.k_pos` is not;
            None: all columns.
        block: tokens of a block.
        choice: what fills `ids` first; None: it stands.
    """

    heads: tuple[int, ...]
    k: Tensor | Packed
    v: Tensor | Packed
    sink: int
    ring: int | None
    bounds: Tensor | None
    sub: int
    see: Visibility
    columns: int
    ids: Tensor | None = None
    block: int = 1
    choice: Choice | None = None


def attend_layer(q: Tensor, k: Tensor, v: Tensor, logits: Logits, groups: Sequence[GroupStep]) -> Tensor:
    """One token a row: store it, choose blocks where that is due, and attend, in every group of heads of a layer.

    For each group what `append_pages`, `score_pages`, `pick_blocks` and `attend_pages` do, one after the other.

    Args:
        q: `[B, Hq, 1, D]`.
        k: `[B, Hkv, 1, D]`.
        v: `[B, Hkv, 1, Dv]`.
        logits: from products to logits.
        groups: each KV head is in one of them.

    Returns:
        `[B, 1, Hq, Dv]`, dtype of q.
    """
    out: Tensor = dispatch.call("attend_layer", q, k, v, logits, groups)
    return out
