"""Which rows of a batch choose pages, and the block tables that come of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import ops
from ..plan import Selector
from ..select.choose import forced, most_forced


@dataclass(frozen=True)
class DecodeRows:
    """Rows of a batch with one query each, and a context beyond the budget.

    Args:
        tokens: `[R]`, int64, where their queries stand in the batch; None: they are the batch.
        table: `[R, M]`, int64, physical blocks; 0 beyond a row's last.
        lengths: `[R]`, int64, tokens of each context, the query's own included.
        selector: how blocks are chosen.
    """

    tokens: Tensor | None
    table: Tensor
    lengths: Tensor
    selector: Selector

    @property
    def read(self) -> Tensor:
        """`[R]`, int32, tokens that each row reads of each head: whole blocks, and its last one as far as it goes."""
        return (most_read(self.selector) - (-self.lengths) % self.selector.block).int()

    def choose(self, q: Tensor, bounds: Tensor) -> Tensor:
        """Physical blocks that each row reads, in the order of the text: `[R, Hs, K]`, int64.

        Args:
            q: `[R, Hq, D]`.
            bounds: `[R, Hkv, M * subs, 2, D]`, of the blocks of `table`.
        """
        selector, blocks = self.selector, self.table.shape[1]
        scores = ops.score_pages(q[:, :, None], bounds, bounds.shape[2] // blocks, selector.share)
        near, most = forced(selector, self.lengths[:, None] - 1, 1), most_forced(selector, 1)
        take = selector.budget.tokens // selector.block  # type: ignore[operator]
        ids = ops.pick_blocks(scores, *near, selector.sink_blocks, take, None, most)[:, :, 0].long()
        return self.table[:, None].expand(-1, ids.shape[1], -1).gather(2, ids)


def rows_that_choose(selector: Selector, starts: Tensor, lengths: Tensor, prompt: Tensor) -> Tensor:
    """Rows of a batch that choose: `[R]`, int64.

    Args:
        selector: how.
        starts: `[B + 1]`, where the queries of each row begin in the batch.
        lengths: `[B]`, tokens of each context, the queries' own included.
        prompt: `[B]`, bool, rows whose queries are of a prompt.
    """
    return ((starts.diff() == 1) & (lengths > most_read(selector)) & ~prompt).nonzero()[:, 0]


def decode_rows(selector: Selector, rows: Tensor, starts: Tensor, lengths: Tensor, table: Tensor) -> DecodeRows:
    """Rows `[R]` of a batch.

    Args:
        selector: how.
        rows: as `rows_that_choose` gives them, one at least.
        starts: as there, like the next.
        lengths: tokens of each context.
        table: `[B, M]`, physical blocks of each row; beyond its last, anything.
    """
    every, lengths = len(rows) == len(lengths), lengths[rows].long()
    blocks = -(-int(lengths.max()) // selector.block)
    held = torch.arange(blocks) * selector.block < lengths[:, None]
    tokens = None if every else starts[rows].long()
    return DecodeRows(tokens, torch.where(held, table[rows, :blocks].long(), 0), lengths, selector)


def most_read(selector: Selector) -> int:
    """Tokens of all blocks that a step reads."""
    assert selector.budget.tokens is not None
    return selector.budget.tokens + (selector.sink_blocks + most_forced(selector, 1)) * selector.block


def heads_apart(blocks: Tensor, kv_heads: int) -> Tensor:
    """Block tables over a cache whose blocks are one KV head's: `[R, Hkv, K]` to `[R * Hkv, K]`, int32.

    A cache `[blocks, Hkv, ...]` is one of `blocks * Hkv` blocks with a single head each. So a kernel that takes one
    block table for all heads of a row takes one a head, if each head comes as a row of its own.
    """
    return (blocks * kv_heads + torch.arange(kv_heads)[:, None]).flatten(0, 1).int()
