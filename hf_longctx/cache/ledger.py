"""How many tokens a cache has seen, and what was read of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.count import count_blocks


class Ledger:
    """How many tokens a cache has seen; outlives the cache, so that a report can still speak of it.

    Attributes:
        columns: columns of the batch so far, padding included, but for those let go.
        gone: columns that were let go, those behind them having moved up.
        lengths: `[B]`, int64, real tokens of each row, or None while all rows are alike.
        begun: a call has begun and not yet ended, so that attention knows what fresh tokens are beside.
        loose: `lengths` are there only because nobody looked whether the rows are still alike.
        tail: `[B]`, int64, real tokens of each row since its last padding, or None while there is none.
        kv_bytes: bytes of the stores on their devices after the last call.
        index_bytes: of these, bytes of what is kept beside the keys so that blocks are chosen unread.
        host_bytes: bytes of the stores in host memory or files after the last call.
        most: tokens that a store may hold of a row.
        lookups: of each store with host memory, `[2]`, int64, its `hits` and `misses`.
        tally: per phase and device, how many blocks were read and how many a query could have seen, where heads choose.
    """

    def __init__(self) -> None:
        self.columns = 0
        self.gone = 0
        self.rows = 0
        self.lengths: Tensor | None = None
        self.begun = self.loose = False
        self.tail: Tensor | None = None
        self.kv_bytes = 0
        self.index_bytes = 0
        self.host_bytes = 0
        self.most = math.inf
        self.lookups: list[Tensor] = []
        self.tally: dict[tuple[str, torch.device], Tensor] = {}

    @property
    def stored(self) -> int:
        """Most tokens that any row holds in any store."""
        return int(min(self.columns, self.most))

    @property
    def row_lengths(self) -> Tensor:
        """`[B or 1]`, int64, real tokens of each row."""
        return torch.full((1,), self.columns) if self.lengths is None else self.lengths

    @property
    def hits(self) -> int:
        """Blocks beside the forced ones that were read of stores with host memory, and were on the device."""
        return sum(int(both[0]) for both in self.lookups)

    @property
    def misses(self) -> int:
        """Such blocks that came from the host."""
        return sum(int(both[1]) for both in self.lookups)

    def count(self, ids: Tensor, visible: Tensor) -> None:
        """Count what blocks of queries of a prompt read.

        Args:
            ids: `[B, Hs, N, K]`, int32, blocks; -1 for none.
            visible: `[]`, how many blocks each head could have seen.
        """
        read, seen = self._tally("prefill", ids.device).unbind()
        read += (ids >= 0).sum()
        seen.add_(visible, alpha=ids.shape[1])

    def count_all(self, reads: Sequence[tuple[Tensor, Tensor, int]]) -> None:
        """Count what single queries read in a decode call, in few operations.

        Args:
            reads: of each choice the blocks, `[B, Hs, N, K]`, int32; where the queries stand, `[B or 1, N]`, int64;
                and tokens of a block. Places that lie at the same address are the same.
        """
        alike: dict[Any, list[tuple[Tensor, Tensor, int]]] = {}
        for read in reads:
            ids, pos, block = read
            key = (pos.data_ptr(), pos.shape, pos.stride(), block, ids.shape[0], ids.shape[2:])
            alike.setdefault(key, []).append(read)
        for same in alike.values():
            _, pos, block = same[0]
            count_blocks(self._tally("decode", pos.device), [ids for ids, *_ in same], pos, block)

    def _tally(self, phase: str, device: torch.device) -> Tensor:
        key = (phase, device)
        if key not in self.tally:
            self.tally[key] = torch.zeros(2, dtype=torch.int64, device=device)
        return self.tally[key]

    def settle(self) -> None:
        """Look whether rows that were alike still are; waits for the device, if there is a doubt."""
        if self.loose and self.lengths is not None and bool((self.lengths == self.columns).all()):
            self.lengths = self.tail = None
        self.loose = False

    def density(self, phase: str | None = None) -> float | None:
        """Share of the visible blocks that were read where heads choose, in one phase or both; None: no choice yet."""
        counts = [both.cpu() for (when, _), both in self.tally.items() if phase in (None, when)]
        read, visible = torch.stack(counts).sum(0).tolist() if counts else (0.0, 0.0)
        return read / visible if visible else None
