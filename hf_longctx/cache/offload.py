"""KV memory whose blocks lie in host memory; the device holds those that every step reads, and those read last.

On the device a row and KV head has three kinds of blocks: the sinks', in places of their own; the last ones, which go
round in a ring; and a pool for whatever else is selected. While all of a text fits into the first two, there is neither
a pool nor host memory. From then on a block is copied to the host when it is full, so whatever the device gives up is
there already. Which blocks are in the pool only the device knows: nothing waits for it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.types import parts
from ..plan import HeadPolicy
from .host import HostTier
from .index import index_of
from .kept import Kept
from .marks import Marks
from .pages import Pages, gathered
from .placement import HostLRU
from .pool import Pool
from .rows import Rows, Stored, View, decoded, each, loaded, part, room, saved, straight, token_bytes
from .step import Step


class OffloadedStore:
    """KV memory of one group of heads that keep everything and read selected blocks; otherwise as `Store`.

    Attributes:
        retention: what stays: everything.
        index: what is kept beside the keys for the selectors of the policy, on the device, or None.
        floor: None: nothing is ever overwritten.
        limit: None: no bound.
        kept: what the heads chose last in decode.
        pool: which other blocks are on the device, beside the sinks' and the last ones; None while there are no others.

    Raises:
        ValueError: the folder for files is not there.
    """

    floor: Tensor | None = None
    limit: int | None = None

    def __init__(self, policy: HeadPolicy) -> None:
        placement = policy.placement
        assert isinstance(placement, HostLRU)
        if placement.disk is not None and not os.path.isdir(placement.disk):
            raise ValueError(
                f"HostLRU: expected disk as a folder that exists; got {placement.disk!r}. Make it, or leave disk out."
            )
        self.retention, self.index, self.pages = policy.retention, index_of(policy), Pages.of(policy)
        self._kv, self._keys, self._values = policy.kv, Rows(policy.kv), Rows(policy.kv)
        self._host = HostTier(self.pages.block, placement.disk)
        self.pool: Pool | None = None
        self.kept = Kept()

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
        there = 0 if tokens <= self.pages.most else self._host.tokens_at(tokens)
        return self.pages.slots_at(tokens) * each_token + beside, there * each_token

    def append(self, k: Tensor, v: Tensor, step: Step) -> View:
        """Store the call's tokens and return all tokens, in the order of positions.

        The first call sees its own tokens; later ones bring those of this layer together on the device for as long as
        the result lives.

        Args:
            k: `[B, Hkv, T, D]`, rotated as it will be read, each row's real tokens first (`step.order`).
            v: `[B, Hkv, T, Dv]`, likewise.
            step: the call.
        """
        if step.columns == 0:
            read = () if self._kv is None else (torch.empty_like(k), torch.empty_like(v))
            self._write(k, v, step, None, read)
            return View(*straight((k, v), read), step.pos if step.ragged else None)
        self.write(k, v, step)
        keys, values = self.whole(step.lengths_after, step.width)
        place = torch.arange(step.width, device=step.device)[None]
        k_pos = torch.where(place < step.lengths_after[:, None], place, -1) if step.ragged else None
        return View(keys, values, k_pos) if step.tokens == 1 else View(decoded(keys), decoded(values), k_pos)

    def write(self, k: Tensor, v: Tensor, step: Step, turns: ops.Turns | None = None) -> None:
        """Store the call's tokens, for queries that read selected blocks; arguments as `Store.write`."""
        if self.k is None or not step.decodes:
            self._write(k, v, step, turns)
            return
        self._reserve(step)
        ops.append_pages(*self.memory, k, v, step.pos, *self.pages.round, None, 1, step.first)
        self._save(step)
        if self.index is not None:
            self.index.follow(self, k, step, turns)

    def prepare(self, step: Step) -> None:
        """Let nothing move on the device while one-token calls follow that `step` has room for."""
        self._reserve(step)
        if self.index is not None:
            self.index.prepare(step)

    def make_room(self, step: Step) -> bool:
        """Let the host have room for the blocks that are full after a call; True if it had not."""
        if self.pool is None or (blocks := step.end // self.pages.block) <= self._host.room:
            return False
        self._host.reserve([x for one in self.memory for x in parts(one)], blocks)
        return True

    def buffers(self) -> list[Any]:
        """What it holds on its device, and where the host's memory is: a recorded call finds everything there."""
        index = [] if self.index is None else self.index.buffers()
        own = [self._keys.data, self._values.data, self._host.table]
        pool = [] if self.pool is None else [self.pool.held, self.pool.counts]
        return [*own, *pool, *index, *self.kept.buffers()]

    def add_mass(self, ids: Tensor, mass: Tensor, block: int) -> None:
        """Tell the index how much attention keys got from the queries near them; arguments as `Marks.add`."""
        assert isinstance(self.index, Marks)
        self.index.add(ids, mass, block)

    def locate(self, ids: Tensor, block: int, step: Step) -> Tensor:
        """Where blocks lie in `memory`, in blocks; those that are not there are brought in first.

        Args:
            ids: `[B, Hs, 1, K]`, int32, ascending blocks, then -1 for none; beside the sinks' and the last ones at most
                `pages.pool` for a row and head. Hs is 1 or Hkv.
            block: tokens of a block.
            step: the call that reads them.

        Returns:
            `[B, Hkv, 1, K]`, int32, -1 where there is no block.
        """
        assert block == self.pages.block
        if step.width <= self.pages.most:
            return ids.expand(*self._keys.filled.shape[:2], -1, -1)
        assert self.pool is not None
        own, lengths = (self.pool.held, self.pool.counts), step.lengths_after
        return ops.bring_blocks(*self.memory, self._host.blocks, ids, lengths, *own, self.pages)

    def whole(self, lengths: Tensor, columns: int) -> tuple[Stored, Stored]:
        """All keys and values on the device as they are stored, column s at position s.

        Columns beyond the end of a row hold anything. A short text is read where it lies, of another this is a copy.

        Args:
            lengths: `[B or 1]`, int64, tokens of each row.
            columns: no row is longer.
        """
        keys, values = self.memory
        if columns > self.pages.most:
            keys, values = gathered(self.pages, self.memory, self._host.blocks, lengths.to(keys.device), columns)
        return part(keys, slice(None), 0, columns), part(values, slice(None), 0, columns)

    def crop(self, tokens: int, columns: int) -> None:
        """Check that the last `tokens` of `columns` columns can be taken back.

        Raises:
            ValueError: attention that they paid was counted.
        """
        if isinstance(self.index, Marks):
            self.index.crop(tokens)

    def take_back(self, tokens: int, lengths: Tensor) -> None:
        """Undo what the last `tokens` of rows did to the ring and the pool.

        Args:
            tokens: that are taken back.
            lengths: `[B or 1]`, int64, tokens of each row until now.
        """
        if self.pool is None or not tokens:
            return
        before = lengths.to(self.pool.held.device)
        after = before - tokens
        self.pool.forget(after // self.pages.block)
        first, last = self.pages.lost(before, after)
        ops.copy_blocks(*self.memory, self._host.blocks, first, last, self.pages.tail, self.pages, out=False)

    def record(self) -> None:
        """Nothing to do: no token is ever lost."""

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`; pick: `[B']`, int64."""
        for piece in (self._keys, self._values, self.index, self.kept, self.pool, self._host):
            if piece is not None:
                piece.map_rows(pick)

    def state(self, columns: int, lengths: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers that `restore` needs: all keys and values once, wherever they lie; as `Store.state`."""
        keys, values = self.whole(lengths, columns)
        (k, about_k), (v, about_v) = saved(keys, "k"), saved(values, "v")
        ends = lengths.expand(keys.shape[0]).tolist()
        return {**k, **v}, {**about_k, **about_v, "ends": ends, "slots": self._keys.slots}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Become what `state` told of; an empty store only."""
        k, v = loaded(tensors, values, "k"), loaded(tensors, values, "v")
        real = torch.arange(k.shape[2]) < torch.tensor(values["ends"])[:, None]
        for rows, stored in ((self._keys, k), (self._values, v)):
            rows.reserve(stored, values["slots"])
        if k.shape[2]:  # not all of the text was taken back
            step = Step.of(0, k.shape[2], k.device, None, real)
            self._reserve(step)
            for span, piece in self.pages.pieces(step):
                for rows, stored in ((self._keys, k), (self._values, v)):
                    rows.put(part(stored, slice(None), span.start, span.stop), piece, *self.pages.round)
                self._save(piece)

    # the keys as the index reads them ------------------------------------------------------------------------------

    def take(self, index: Tensor) -> Tensor:
        """Keys at positions `[B, N]` among the sinks and the last ones: `[B, H, N, D]`."""
        return self._keys.take(self.pages.slot(index))

    def span(self, rows: slice, first: int, last: int) -> Tensor:
        """Keys at positions `first` to `last - 1` of some rows, likewise."""
        slots = self.pages.slot(torch.arange(first, last, device=self._keys.filled.device))
        return decoded(each(self._keys.filled, lambda x: x[rows, :, slots]))

    # writing --------------------------------------------------------------------------------------------------------

    def _write(self, k: Tensor, v: Tensor, step: Step, turns: ops.Turns | None, read: tuple[Tensor, ...] = ()) -> None:
        """Store a call of any size; `read` as in `ops.fill_pages`."""
        blank = self.k is None
        if blank:
            self._keys.begin(k, self._slots(step))
            self._values.begin(v, self._slots(step))
        self._reserve(step)
        for span, piece in self.pages.pieces(step):
            own_k, own_v, *back = (x if piece is step else x[:, :, span] for x in (k, v, *read))
            where = ops.GroupFill(*self.memory, *self.pages.round, None, 1)
            ops.fill_pages([where], own_k, own_v, piece.pos, piece.first, back, blank)
            blank = False
            self._save(piece)
            if self.index is not None:
                self.index.follow(self, own_k, piece, turns)

    def _reserve(self, step: Step) -> None:
        """Make room for a call's tokens beside those that are there."""
        for rows in (self._keys, self._values):
            rows.reserve(rows.filled, self._slots(step))
        if self.pool is None and step.width > self.pages.most:
            self._begin(step)
        self.make_room(step)

    def _slots(self, step: Step) -> int:
        """Tokens of a row that there must be room for in a call."""
        return min(room(self._keys.slots, self.pages.slots_at(step.width), self.pages.block), self.pages.slots)

    def _begin(self, step: Step) -> None:
        """Let the host have what rows have so far, all of which is on the device: a call may take the place of some."""
        k, block = self._keys.filled, self.pages.block
        self.pool = Pool(k.shape[0], k.shape[1], self.pages.pool, k.device)
        if step.columns >= block:
            self.make_room(step)
            first, last = step.once(("so far", block), lambda: (0 * step.lengths, step.lengths // block))
            ops.copy_blocks(*self.memory, self._host.blocks, first, last, step.columns // block, self.pages, out=True)

    def _save(self, step: Step) -> None:
        """Copy the blocks that a call has filled to the host, if it is asked yet; they are all on the device still."""
        block = self.pages.block
        if self.pool is None or (not step.ragged and step.end // block == step.columns // block):
            return
        first, last = step.once(("full", block), lambda: (step.lengths // block, step.lengths_after // block))
        ops.copy_blocks(*self.memory, self._host.blocks, first, last, -(-step.tokens // block), self.pages, out=True)
