"""Which rows of a batch choose pages, and the block tables that come of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import ops
from ..plan import Selector
from ..select.choose import forced, most_forced
from .settings import Ends, Roles


@dataclass(frozen=True)
class DecodeRows:
    """Rows of a batch with one query each, and a context that not every head reads whole.

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

    def read(self, blocks: int) -> Tensor:
        """`[R]`, int32, tokens in so many blocks of each row: all are full but its last one, which is among them."""
        return (self.lengths - self._left_out(blocks) * self.selector.block).int()

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
        ids = ids.clamp(min=0)  # beyond the last of a row that has fewer: not read
        return self.table[:, None].expand(-1, ids.shape[1], -1).gather(2, ids)

    def at_ends(self, ends: Ends) -> Tensor:
        """Physical blocks at both ends of each row, or all it has, in the order of the text: `[R, K]`, int64."""
        near = torch.arange(min(ends.blocks, self.table.shape[1]))
        return self.table.gather(1, near + (near >= ends.first) * self._left_out(ends.blocks)[:, None])

    def _left_out(self, blocks: int) -> Tensor:
        """`[R]`, int64, blocks of each row beyond so many."""
        return (-(-self.lengths // self.selector.block) - blocks).clamp(min=0)


def rows_that_choose(selector: Selector, ends: Ends | None, starts: Tensor, lengths: Tensor, prompt: Tensor) -> Tensor:
    """Rows of a batch that some head does not read whole: `[R]`, int64.

    Args:
        selector: how heads that retrieve choose.
        ends: what streaming heads read, if there are any.
        starts: `[B + 1]`, where the queries of each row begin in the batch.
        lengths: `[B]`, tokens of each context, the queries' own included.
        prompt: `[B]`, bool, rows whose queries are of a prompt.
    """
    least = most_read(selector)
    if ends is not None:
        least = min(least, ends.blocks * selector.block)
    return ((starts.diff() == 1) & (lengths > least) & ~prompt).nonzero()[:, 0]


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


def tables_apart(rows: DecodeRows, roles: Roles, ends: Ends | None, chosen: Tensor | None) -> Tensor:
    """Block tables over a cache whose blocks are one KV head's: `[R * Hkv, K]`, int32.

    A cache `[blocks, Hkv, ...]` is one of `blocks * Hkv` blocks with a single head each. So a kernel that takes one
    block table for all heads of a row takes one a head, if each head comes as a row of its own.

    Args:
        rows: of the batch.
        roles: of the KV heads.
        ends: what the heads that stream read; None only where there are none.
        chosen: `[R, heads that retrieve or 1, K']`, physical blocks; None only where there are none.
    """
    retrieve = torch.tensor(roles)
    parts = [] if chosen is None else [(retrieve, chosen)]
    if ends is not None and not all(roles):
        parts.append((~retrieve, rows.at_ends(ends)[:, None]))
    blocks = rows.table.new_zeros(len(rows.lengths), len(roles), max(part.shape[2] for _, part in parts))
    for heads, part in parts:
        blocks[:, heads, : part.shape[2]] = part
    return (blocks * len(roles) + torch.arange(len(roles))[:, None]).flatten(0, 1).int()


def lengths_apart(rows: DecodeRows, roles: Roles, ends: Ends | None) -> Tensor:
    """Tokens that each head of each row reads, `[R * Hkv]`, int32, beside `tables_apart`."""
    chosen = rows.read(most_read(rows.selector) // rows.selector.block)
    streamed = chosen if ends is None else rows.read(ends.blocks)
    return torch.where(torch.tensor(roles), chosen[:, None], streamed[:, None]).flatten()
