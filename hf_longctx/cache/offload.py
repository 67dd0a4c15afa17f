"""KV memory whose blocks lie in host memory; the device holds those that every step reads, and those read last.

On the device a row and KV head has three kinds of blocks: the sinks', in places of their own; the last ones, which go
round in a ring; and a pool for whatever else is selected. A block is copied to the host when it is full, so whatever
the device gives up is there already.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..kernels import ops
from ..plan import HeadPolicy
from .host import HostTier
from .index import Marks, index_of
from .placement import HostLRU
from .pool import Pool
from .rows import Rows, Stored, decoded, each, part, parts, slot_of, token_bytes
from .step import Step
from .store import View, marked

FEW = 8
"""Most tokens of a call that selects for each of them; longer ones select for blocks of queries."""


class OffloadedStore:
    """KV memory of one group of heads that keep everything and read selected blocks; otherwise as `Store`.

    Attributes:
        retention: what stays: everything.
        index: what is kept beside the keys for the selectors of the policy, on the device, or None.
        floor: None: nothing is ever overwritten.
        limit: None: no bound.

    Raises:
        ValueError: the folder for files is not there.
    """

    floor: Tensor | None = None
    limit: int | None = None

    def __init__(self, policy: HeadPolicy) -> None:
        selector, placement = policy.decode, policy.placement
        assert selector is not None and selector.budget.tokens is not None and isinstance(placement, HostLRU)
        if placement.disk is not None and not os.path.isdir(placement.disk):
            raise ValueError(
                f"HostLRU: expected disk as a folder that exists; got {placement.disk!r}. Make it, or leave disk out."
            )
        self.retention, self.index, self.block = policy.retention, index_of(policy), selector.block
        self.sink_blocks = selector.sink_blocks
        most = max(selector.scorer.q_block, FEW)
        self.tail_blocks = -(-(selector.local + 2 * most) // self.block) + 3
        again = -(-selector.refresh_every // self.block)  # blocks that were local when a selection was made
        self.pool_blocks = max(placement.resident_blocks, selector.budget.tokens // self.block + again)
        self._slots = (self.sink_blocks + self.tail_blocks + self.pool_blocks) * self.block
        self._kv, self._keys, self._values = policy.kv, Rows(policy.kv), Rows(policy.kv)
        self._host = HostTier(self.block, placement.disk)
        self._pool: Pool | None = None
        self._ends: list[int] = []  # tokens of each row

    @property
    def k(self) -> Stored | None:
        """`[B, Hkv, slots, D]` on the device, or None before the first token."""
        return self._keys.data

    @property
    def v(self) -> Stored | None:
        """`[B, Hkv, slots, Dv]`, likewise."""
        return self._values.data

    @property
    def kv_bytes(self) -> int:
        """Bytes on the device, those of the index included."""
        return self._keys.nbytes + self._values.nbytes + (0 if self.index is None else self.index.nbytes)

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory, or in files."""
        return self._host.nbytes

    @property
    def hits(self) -> int:
        """Selected blocks beside the forced ones that were on the device."""
        return 0 if self._pool is None else self._pool.hits

    @property
    def misses(self) -> int:
        """Selected blocks that came from the host."""
        return 0 if self._pool is None else self._pool.misses

    @property
    def memory(self) -> tuple[Stored, Stored]:
        """Keys and values on the device, to be read at the places that `locate` gives."""
        return self._keys.filled, self._values.filled

    @property
    def summaries(self) -> Tensor | None:
        """`[B, Hkv, M', R, D]`, what the index says of each sub-block."""
        return None if self.index is None else self.index.entries

    def bytes_at(self, tokens: int, dim: int, itemsize: int) -> tuple[int, int]:
        """Bytes of a row and KV head on the device and on the host after `tokens` tokens; arguments as in `Store`."""
        each_token = 2 * token_bytes(self._kv, dim, itemsize)
        beside = 0 if self.index is None else self.index.bytes_at(tokens, dim, itemsize)
        return self._slots * each_token + beside, self._host.tokens_at(tokens) * each_token

    def append(self, k: Tensor, v: Tensor, step: Step) -> View:
        """Store the call's tokens and return all tokens, in the order of positions.

        The first call sees its own tokens; later ones bring those of this layer together on the device for as long as
        the result lives.

        Args:
            k: `[B, Hkv, T, D]`, rotated as it will be read, each row's real tokens first (`step.order`).
            v: `[B, Hkv, T, Dv]`, likewise.
            step: the call.
        """
        keys, values = self._keys.encode(k), self._values.encode(v)
        self._write(keys, values, k, step, None)
        if step.columns == 0:
            return View(decoded(keys), decoded(values), step.pos if step.ragged else None)
        keys, values = self.whole()
        place = torch.arange(keys.shape[2], device=step.device)[None]
        k_pos = torch.where(place < step.lengths_after[:, None], place, -1) if step.ragged else None
        return View(decoded(keys), decoded(values), k_pos)

    def write(self, k: Tensor, v: Tensor, step: Step, turns: ops.Turns | None = None) -> None:
        """Store the call's tokens, for queries that read selected blocks; arguments as `Store.write`."""
        self._write(self._keys.encode(k), self._values.encode(v), k, step, turns)

    def add_mass(self, ids: Tensor, mass: Tensor, block: int) -> None:
        """Tell the index how much attention keys got from the queries near them; arguments as `Marks.add`."""
        assert isinstance(self.index, Marks)
        self.index.add(ids, mass, block)

    def locate(self, ids: Tensor, block: int) -> Tensor:
        """Where blocks lie in `memory`, in blocks; those that are not there are brought in first. Waits for the device.

        Args:
            ids: `[B, Hs, N, K]`, int32, blocks, -1 for none; beside the sinks' and the last ones at most `pool_blocks`
                different ones for a row and head. Hs is 1 or Hkv.
            block: tokens of a block.

        Returns:
            `[B, Hkv, N, K]`, int32, -1 where there is no block.
        """
        assert block == self.block and self._pool is not None
        rows, heads = self._keys.filled.shape[:2]
        wanted = ids.cpu().long().expand(rows, heads, -1, -1).flatten(2)
        last = (torch.tensor(self._ends)[:, None, None] - 1) // block
        far = (wanted >= self.sink_blocks) & (wanted <= last - self.tail_blocks)
        slots, missing = self._pool.claim(torch.where(far, wanted, -1))
        pool = self.sink_blocks + self.tail_blocks
        self._bring(missing.rows, missing.heads, missing.ids, pool + missing.slots)
        pages = torch.where(far, pool + slots, slot_of(wanted, self.sink_blocks, self.tail_blocks))
        pages = torch.where(wanted < 0, -1, pages).view(rows, heads, *ids.shape[2:])
        return pages.to(torch.int32).to(ids.device)

    def whole(self) -> tuple[Stored, Stored]:
        """All keys and values on the device as they are stored, column s at position s: a copy.

        Columns beyond the end of a row hold anything.
        """
        longest = max(self._ends)
        size = -(-longest // self.block) * self.block
        keys, values = (
            each(rows.filled, lambda x: x.new_zeros(*x.shape[:2], size, x.shape[3]))
            for rows in (self._keys, self._values)
        )
        targets = self._paged(keys, values)
        self._host.copy_to(targets)
        found = [(row, j) for row, end in enumerate(self._ends) for j in self._resident(end)]
        row, j = torch.tensor(found, dtype=torch.int64, device=keys.device).view(-1, 2).unbind(1)
        pages = slot_of(j, self.sink_blocks, self.tail_blocks)
        for target, x in zip(targets, self._paged(), strict=True):
            target[row, :, j] = x[row, :, pages]
        return part(keys, slice(None), 0, longest), part(values, slice(None), 0, longest)

    def crop(self, tokens: int, columns: int) -> None:
        """Check that the last `tokens` of `columns` columns can be taken back; what the ring lost comes from the host.

        Raises:
            ValueError: attention that they paid was counted.
        """
        if tokens and isinstance(self.index, Marks):
            raise marked(tokens)

    def record(self) -> None:
        """Nothing to do: no token is ever lost."""

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`; pick: `[B']`, int64."""
        for piece in (self._keys, self._values, self.index, self._pool, self._host):
            if piece is not None:
                piece.map_rows(pick)
        self._ends = [self._ends[row] for row in pick.tolist()] if self._ends else []

    # the keys as the index reads them ------------------------------------------------------------------------------

    def take(self, index: Tensor) -> Tensor:
        """Keys at positions `[B, N]` among the sinks and the last ones: `[B, H, N, D]`."""
        return self._keys.take(self._slot(index))

    def span(self, rows: slice, first: int, last: int) -> Tensor:
        """Keys at positions `first` to `last - 1` of some rows, likewise."""
        slots = self._slot(torch.arange(first, last, device=self._keys.filled.device))
        return decoded(each(self._keys.filled, lambda x: x[rows, :, slots]))

    # which block is where ------------------------------------------------------------------------------------------

    def _slot(self, pos: Tensor) -> Tensor:
        return slot_of(pos, self.sink_blocks * self.block, self.tail_blocks * self.block)

    def _resident(self, end: int) -> list[int]:
        """Blocks of a row of `end` tokens that are on the device in any case."""
        last = (end - 1) // self.block
        sinks = range(min(self.sink_blocks, last + 1))
        return [*sinks, *range(max(self.sink_blocks, last - self.tail_blocks + 1), last + 1)]

    def _paged(self, *stored: Stored) -> list[Tensor]:
        """All tensors of keys and values in blocks: `[B, H, P, block, ?]`, sharing memory."""
        both = stored or (self._keys.filled, self._values.filled)
        tensors = [x for one in both for x in parts(one)]
        return [x.view(*x.shape[:2], -1, self.block, x.shape[3]) for x in tensors]

    # writing --------------------------------------------------------------------------------------------------------

    def _write(self, keys: Stored, values: Stored, k: Tensor, step: Step, turns: ops.Turns | None) -> None:
        """In pieces that leave the ring time to be copied."""
        spans = step.spans if step.ragged else [(step.columns, step.tokens)] * k.shape[0]
        self._prepare(keys, values, spans)
        size = (self.tail_blocks - 1) * self.block
        for start in range(0, step.tokens, size):
            stop = min(step.tokens, start + size)
            piece = step if stop - start == step.tokens else step.part(start, stop)
            for rows, fresh in ((self._keys, keys), (self._values, values)):
                sink, ring = self.sink_blocks * self.block, self.tail_blocks * self.block
                rows.put(part(fresh, slice(None), start, stop), piece, sink, ring)
            for row, (first, count) in enumerate(spans if step.ragged else spans[:1]):
                which = slice(row, row + 1) if step.ragged else slice(None)
                low, high = ((first + min(count, end)) // self.block for end in (start, stop))
                self._copy_out(which, low, high)
            self._ends = [first + min(count, stop) for first, count in spans]
            if self.index is not None:
                self.index.follow(self, k[:, :, start:stop], piece, turns)

    def _prepare(self, keys: Stored, values: Stored, spans: list[tuple[int, int]]) -> None:
        """Make room, and undo what cropped tokens did to the ring and the pool."""
        for rows, fresh in ((self._keys, keys), (self._values, values)):
            rows.reserve(fresh, self._slots)
        if self._pool is None:
            self._pool = Pool(keys.shape[0], keys.shape[1], self.pool_blocks)
            self._ends = [0] * keys.shape[0]
        like = [x for one in (keys, values) for x in parts(one)]
        self._host.reserve(like, max(first + count for first, count in spans) // self.block)
        for row, (end, (first, _)) in enumerate(zip(self._ends, spans, strict=True)):
            if first < end:
                self._pool.forget(row, first // self.block)
                self._bring_back(row, (end - 1) // self.block, (first - 1) // self.block)

    def _bring_back(self, row: int, before: int, last: int) -> None:
        """Fill the ring as if block `last` of a row had been its newest all along, when it was `before`."""
        lost = range(max(self.sink_blocks, last - self.tail_blocks + 1), min(last, before - self.tail_blocks) + 1)
        ids = torch.tensor(lost, dtype=torch.int64)
        heads = torch.arange(self._keys.filled.shape[1]).repeat_interleave(len(ids))
        ids = ids.repeat(self._keys.filled.shape[1])
        self._bring(torch.full_like(ids, row), heads, ids, slot_of(ids, self.sink_blocks, self.tail_blocks))

    def _bring(self, rows: Tensor, heads: Tensor, ids: Tensor, pages: Tensor) -> None:
        """Copy blocks from the host into places on the device; all arguments `[n]`, int64, on the host."""
        if not len(ids):
            return
        device = self._keys.filled.device
        index = tuple(x.to(device, non_blocking=True) for x in (rows, heads, pages))
        for target, block in zip(self._paged(), self._host.get(rows, heads, ids), strict=True):
            target[index] = block.to(device, non_blocking=True)

    def _copy_out(self, rows: slice, first: int, last: int) -> None:
        """Copy full blocks `first` to `last - 1` of some rows to the host."""
        if first < last:
            ids = torch.arange(first, last, device=self._keys.filled.device)
            pages = slot_of(ids, self.sink_blocks, self.tail_blocks)
            self._host.put(rows, first, [x[rows, :, pages] for x in self._paged()])
