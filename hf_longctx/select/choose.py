"""The choice that a selector makes for each block of queries."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..kernels import ops
from ..plan import Selector
from .scorers import Look

_LATE = 2**31 - 1


def choose(selector: Selector, look: Look, near: tuple[Tensor, Tensor]) -> Tensor:
    """The blocks of keys that each block of queries reads: `[B, Hs, N, K]`, int32, ascending, then -1.

    Args:
        selector: how it is done.
        look: the queries and what they may look at.
        near: `forced` of the queries.
    """
    scores = selector.scorer.score(look)  # type: ignore[attr-defined]  # a protocol of plan/, which knows no tensors
    take = None if selector.budget.tokens is None else selector.budget.tokens // selector.block
    shares = selector.budget.shares
    tau = None if shares is None else _shares(shares, scores.shape[1], scores.device)
    return ops.pick_blocks(scores, *near, selector.sink_blocks, take, tau, most_forced(selector, look.q_block))


def forced(selector: Selector, q_pos: Tensor, q_block: int) -> tuple[Tensor, Tensor]:
    """First and last of the local blocks of each block of queries: `[B or 1, N]`, int64; last is -1 without a query."""
    if q_block == 1:
        block = q_pos // selector.block  # of -1: -1
        plain = selector.local == 1 and selector.dense_below <= 0
        return block.clamp(min=0) if plain else _first_forced(selector, q_pos, q_pos), block
    pos = q_pos.view(q_pos.shape[0], -1, q_block)
    last = pos.amax(-1)
    first = pos.masked_fill(pos < 0, _LATE).amin(-1)
    return _first_forced(selector, first, last), torch.where(last < 0, -1, last // selector.block)


def _first_forced(selector: Selector, first: Tensor, last: Tensor) -> Tensor:
    """First of the local blocks, where the first and last query stand; 0 without a query."""
    back = first if selector.local == 1 else first - (selector.local - 1)
    low = back.clamp(min=0) // selector.block
    whole = max(selector.dense_below, 0)
    return low if last is first and whole == 0 else torch.where(last < whole, 0, low)


def all_from(selector: Selector, near: tuple[Tensor, Tensor], first: Tensor) -> tuple[Tensor, Tensor]:
    """What is forced where blocks of queries with one at or after a position read everything; as `forced`.

    Args:
        selector: whose blocks of queries are as long as those of keys.
        near: `forced` of the queries.
        first: `[B or 1]`, int64, the position.
    """
    low, last = near
    return torch.where(last >= first.clamp(min=0)[:, None] // selector.block, 0, low), last


def forced_ahead(selector: Selector, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """What is forced for one query a row, and for all that go by its choice after it: nothing is left to add then.

    Args:
        selector: that chooses every `refresh_every` steps.
        lengths: `[B or 1]`, int64, tokens of each row before the query, which is where it stands; a row without one
            chooses for those to come.

    Returns:
        As `forced`.
    """
    first = lengths[:, None]
    return _first_forced(selector, first, first), (first + (selector.refresh_every - 1)) // selector.block


def visible_to(last: Tensor, rows: int) -> Tensor:
    """`[]`, int64, how many blocks so many rows could see: those to `last`, `[rows or 1, N]`, -1 for none."""
    blocks = (last + 1).expand(rows, -1)
    return blocks.view(()) if blocks.numel() == 1 else blocks.sum()


def most_forced(selector: Selector, q_block: int) -> int:
    """Most local blocks of a block of queries, and of those that go by its choice after it."""
    after = selector.refresh_every - 1
    span = selector.local + q_block - 1 + after
    return max((span + selector.block - 2) // selector.block + 1, -(-(selector.dense_below + after) // selector.block))


def most_far(selector: Selector, q_block: int) -> int | None:
    """Most blocks, of those that a block of queries reads, with a key outside one's local window; None: no bound."""
    tokens = selector.budget.tokens
    if tokens is None or selector.dense_below:
        return None
    since = q_block + selector.refresh_every - 1  # tokens from the first query of the choice to the last that uses it
    local = -(-(since + selector.block - 2) // selector.block)  # in the window of the first, not in that of the last
    return selector.sink_blocks + tokens // selector.block + local


@lru_cache(maxsize=4096)
def _shares(shares: tuple[float, ...], heads: int, device: torch.device) -> Tensor:
    """`[Hs]`, float32, made once: making it waits for the device."""
    assert len(shares) in (1, heads)
    return torch.tensor(shares, dtype=torch.float32, device=device).expand(heads)
