"""KV memory whose blocks lie in host memory; the device holds those that every step reads, and those read last.

On the device a row and KV head has three kinds of blocks: the sinks', in places of their own; the last ones, which go
round in a ring; and a pool for whatever else is selected. A block is copied to the host when it is full, so whatever
the device gives up is there already.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..plan import HeadPolicy
from .host import HostTier
from .index import index_of
from .kept import Kept
from .marks import Marks, marked
from .pages import Pages
from .placement import HostLRU
from .pool import Pool
from .rows import Rows, Stored, View, as_stored, decoded, each, loaded, part, parts, room, saved, token_bytes
from .step import Step


class OffloadedStore:
    """KV memory of one group of heads that keep everything and read selected blocks; otherwise as `Store`.

    Attributes:
        retention: what stays: everything.
        index: what is kept beside the keys for the selectors of the policy, on the device, or None.
        floor: None: nothing is ever overwritten.
        limit: None: no bound.
        kept: what the heads chose last in decode.

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
        self._pool: Pool | None = None
        self._ends = torch.zeros(0, dtype=torch.int64)  # tokens of each row; on the host
        self._saved = torch.zeros(0, dtype=torch.int64)  # blocks of each row that the host has; likewise
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
        return self.pages.slots_at(tokens) * each_token + beside, self._host.tokens_at(tokens) * each_token

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
        self._take_in(keys, values, k, step, None)
        if step.columns == 0:
            return View(as_stored(k, keys), as_stored(v, values), step.pos if step.ragged else None)
        keys, values = self.whole()
        place = torch.arange(keys.shape[2], device=step.device)[None]
        k_pos = torch.where(place < step.lengths_after[:, None], place, -1) if step.ragged else None
        return View(decoded(keys), decoded(values), k_pos)

    def write(self, k: Tensor, v: Tensor, step: Step, turns: ops.Turns | None = None) -> None:
        """Store the call's tokens, for queries that read selected blocks; arguments as `Store.write`."""
        self._take_in(self._keys.encode(k), self._values.encode(v), k, step, turns)

    def add_mass(self, ids: Tensor, mass: Tensor, block: int) -> None:
        """Tell the index how much attention keys got from the queries near them; arguments as `Marks.add`."""
        assert isinstance(self.index, Marks)
        self.index.add(ids, mass, block)

    def locate(self, ids: Tensor, block: int) -> Tensor:
        """Where blocks lie in `memory`, in blocks; those that are not there are brought in first.

        It waits for the device, once, if a row is so long that a block has no place of its own any more.

        Args:
            ids: `[B, Hs, N, K]`, int32, blocks, -1 for none; beside the sinks' and the last ones at most `pages.pool`
                different ones for a row and head. Hs is 1 or Hkv.
            block: tokens of a block.

        Returns:
            `[B, Hkv, N, K]`, int32, -1 where there is no block.
        """
        pages, pool = self.pages, self._pool
        assert block == pages.block and pool is not None
        rows, heads = self._keys.filled.shape[:2]
        first = pages.sinks + pages.tail
        if int(self._ends.max()) <= first * block:
            return ids.expand(rows, heads, -1, -1)
        leaving = self._leaving(wait=False)
        wanted = ids.cpu()  # waits, and what leaves has arrived then
        self._host.put(*leaving)
        wanted = wanted.long().expand(rows, heads, -1, -1).flatten(2)
        far = pages.is_far(wanted, self._ends[:, None, None])
        slots, missing = pool.claim(torch.where(far, wanted, -1))
        self._host.bring(self._paged(), missing.rows, missing.heads, missing.ids, first + missing.slots)
        places = torch.where(far, first + slots, torch.where(wanted < 0, -1, pages.page(wanted)))
        return places.view(rows, heads, *ids.shape[2:]).to(torch.int32).to(ids.device, non_blocking=True)

    def whole(self) -> tuple[Stored, Stored]:
        """All keys and values on the device as they are stored, column s at position s: a copy.

        Columns beyond the end of a row hold anything.
        """
        longest = int(self._ends.max())
        blocks = -(-longest // self.pages.block)
        size = blocks * self.pages.block
        keys, values = (
            each(rows.filled, lambda x: x.new_zeros(*x.shape[:2], size, x.shape[3]))
            for rows in (self._keys, self._values)
        )
        targets = self._paged(keys, values)
        self._host.copy_to(targets, int(self._saved.max()))
        j, ends = torch.arange(blocks)[None], self._ends[:, None]
        here = (j * self.pages.block < ends) & ~self.pages.is_far(j, ends)
        row, j = here.nonzero().to(keys.device).unbind(1)
        pages = self.pages.page(j)
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
        for piece in (self._keys, self._values, self.index, self.kept, self._pool, self._host):
            if piece is not None:
                piece.map_rows(pick)
        if len(self._ends):
            self._ends, self._saved = self._ends[pick.cpu()], self._saved[pick.cpu()]

    def state(self, columns: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers that `restore` needs: all keys and values once, wherever they lie."""
        keys, values = self.whole()
        (k, about_k), (v, about_v) = saved(keys, "k"), saved(values, "v")
        return {**k, **v}, {**about_k, **about_v, "ends": self._ends.tolist(), "slots": self._keys.slots}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Become what `state` told of; an empty store only."""
        k, v = loaded(tensors, values, "k"), loaded(tensors, values, "v")
        real = torch.arange(k.shape[2]) < torch.tensor(values["ends"])[:, None]
        for rows, stored in ((self._keys, k), (self._values, v)):
            rows.reserve(stored, values["slots"])
        for _ in self._put(k, v, Step.of(0, k.shape[2], k.device, None, real)):
            pass

    # the keys as the index reads them ------------------------------------------------------------------------------

    def take(self, index: Tensor) -> Tensor:
        """Keys at positions `[B, N]` among the sinks and the last ones: `[B, H, N, D]`."""
        return self._keys.take(self.pages.slot(index))

    def span(self, rows: slice, first: int, last: int) -> Tensor:
        """Keys at positions `first` to `last - 1` of some rows, likewise."""
        slots = self.pages.slot(torch.arange(first, last, device=self._keys.filled.device))
        return decoded(each(self._keys.filled, lambda x: x[rows, :, slots]))

    def _paged(self, *stored: Stored) -> list[Tensor]:
        """All tensors of keys and values in blocks: `[B, H, P, block * ?]`, sharing memory."""
        both = stored or (self._keys.filled, self._values.filled)
        tensors = [x for one in both for x in parts(one)]
        return [x.view(*x.shape[:2], -1, self.pages.block * x.shape[3]) for x in tensors]

    # writing --------------------------------------------------------------------------------------------------------

    def _take_in(self, keys: Stored, values: Stored, k: Tensor, step: Step, turns: ops.Turns | None) -> None:
        for span, piece in self._put(keys, values, step):
            if self.index is not None:
                self.index.follow(self, k[:, :, span], piece, turns)

    def _put(self, keys: Stored, values: Stored, step: Step) -> Iterator[tuple[slice, Step]]:
        """Store a call in pieces that leave the ring time to be copied; yields each piece once it is stored."""
        before, count = step.runs(keys.shape[0])
        self._prepare(keys, values, step, before, count)
        size, sinks = self.pages.ring - self.pages.block, self.pages.sinks * self.pages.block
        for start in range(0, step.tokens, size):
            stop = min(step.tokens, start + size)
            piece = step if stop - start == step.tokens else step.part(start, stop)
            ends = before + count.clamp(max=stop)
            if bool(self.pages.is_far(self._saved.clamp(min=self.pages.sinks), ends).any()):  # it is overwritten now
                self._host.put(*self._leaving(wait=True))
            for rows, fresh in ((self._keys, keys), (self._values, values)):
                rows.put(part(fresh, slice(None), start, stop), piece, sinks, self.pages.ring)
            self._ends = ends
            yield slice(start, stop), piece

    def _prepare(self, keys: Stored, values: Stored, step: Step, before: Tensor, count: Tensor) -> None:
        """Make room, and undo what cropped tokens did to the ring and the pool."""
        block = self.pages.block
        need = self.pages.slots_at(step.end)
        for rows, fresh in ((self._keys, keys), (self._values, values)):
            rows.reserve(fresh, min(room(rows.slots, need, block), self.pages.slots))
        if self._pool is None:
            self._pool = Pool(keys.shape[0], keys.shape[1], self.pages.pool)
            self._ends, self._saved = torch.zeros_like(before), torch.zeros_like(before)
        like = [x for one in (keys, values) for x in parts(one)]
        self._host.reserve(like, int((before + count).max()) // block)
        self._saved = torch.minimum(self._saved, before // block)
        for row in (before < self._ends).nonzero()[:, 0].tolist():
            end = int(before[row])
            self._pool.forget(row, end // block)
            self._bring_back(row, self.pages.lost(int(self._ends[row]), end))
        self._ends = before

    def _bring_back(self, row: int, blocks: list[int]) -> None:
        """Fill blocks of a row into the ring."""
        heads = self._keys.filled.shape[1]
        ids = torch.tensor(blocks, dtype=torch.int64).repeat(heads)
        head = torch.arange(heads).repeat_interleave(len(blocks))
        self._host.bring(self._paged(), torch.full_like(ids, row), head, ids, self.pages.page(ids))

    def _leaving(self, wait: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Full blocks that the host does not have yet, as `HostTier.put` wants them; they are all in the ring still.

        Args:
            wait: False leaves the copy to the host under way: nothing may look at it before the device has caught up.
        """
        done = self._ends // self.pages.block
        more = done - self._saved
        rows = torch.arange(len(more)).repeat_interleave(more)
        ids = torch.arange(len(rows)) + (done - more.cumsum(0))[rows]
        self._saved = done
        return rows, ids, self._host.taken(self._paged(), rows, self.pages.page(ids), wait)
