"""How many blocks are read where heads choose: contract of the operation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import dispatch


def count_blocks(tally: Tensor, ids: Sequence[Tensor], pos: Tensor, block: int) -> None:
    """Add up, in place, what queries read of the blocks that they could see: from the first to their own.

    Args:
        tally: `[2]`, int64: blocks read, in all heads, and blocks from the first to a query's own, likewise.
        ids: of each layer `[B, Hs, N, K]`, int32, blocks; -1 for none. All have the same B, N and K.
        pos: `[B or 1, N]`, int64, where each query stands; -1: nowhere.
        block: tokens of a block.

    Raises:
        UnsupportedError: the backend asked for does not take these arguments.
    """
    dispatch.call("count_blocks", tally, ids, pos, block)
