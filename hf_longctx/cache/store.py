"""The only owner of KV memory: for each group of heads of a layer, preallocated slots that grow by pages.

A row's token `p` lives in slot `p`; where retention has a window, tokens beyond the sinks go round in a ring, so that
the newest overwrites the oldest exactly when that leaves the window. Which token a slot holds follows from the row's
length alone; there is no table to keep in step. Padding is never stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..plan import HeadPolicy
from .before import Before
from .index import Bounds, index_of
from .kept import Kept
from .marks import Marks
from .place import Place, positions_in, slot_of
from .rows import PAGE, Rows, Stored, View, decoded, loaded, part, room, saved, straight, token_bytes
from .step import FEW, Step

ROLLBACK = 128
"""Tokens beyond the window that stay while `crop` may take tokens back (assisted decoding)."""


class Store:
    """KV memory of one group of heads, on the device.

    With a lossy format whatever is read is what the store holds, the call's own tokens included, so that any chunking
    of the input reads the same.

    Attributes:
        retention: what stays.
        index: what is kept beside the keys for the selectors of the policy, or None.
        floor: `[B or 1, 1]`, int64, oldest position outside the sinks that a window grown wider again still finds; None
            as long as it never grew.
        kept: what the heads chose last in decode.
        host_bytes: bytes in host memory: none.
    """

    host_bytes = 0

    def __init__(self, policy: HeadPolicy) -> None:
        self.retention = policy.retention
        self.index = index_of(policy)
        self.floor: Tensor | None = None
        self.kept = Kept()
        self._kv, self._keys, self._values = policy.kv, Rows(policy.kv), Rows(policy.kv)
        self._ring: int | None = policy.retention.window  # tokens that go round; None: nothing is ever overwritten
        self._lost = 0  # columns before this one were overwritten, sinks aside
        self._rollback = 0

    @property
    def k(self) -> Stored | None:
        """`[B, Hkv, capacity, D]` as stored, or None before the first token."""
        return self._keys.data

    @property
    def v(self) -> Stored | None:
        """`[B, Hkv, capacity, Dv]`, likewise."""
        return self._values.data

    @property
    def kv_bytes(self) -> int:
        """Bytes of the live tensors, those of the index included."""
        return self._keys.nbytes + self._values.nbytes + (0 if self.index is None else self.index.nbytes)

    @property
    def limit(self) -> int | None:
        """Most tokens of a row that are ever stored; None: no bound."""
        return None if self._ring is None else self.retention.sink + self._ring

    @property
    def memory(self) -> tuple[Stored, Stored]:
        """Keys and values as stored, for selected reads: where everything is kept, column s holds position s."""
        return self._keys.filled, self._values.filled

    def bytes_at(self, tokens: int, dim: int, itemsize: int) -> tuple[int, int]:
        """Bytes of a row and KV head on the device and on the host after `tokens` tokens, room for more aside.

        Args:
            tokens: of the row.
            dim: channels of a key, and of a value.
            itemsize: bytes of a channel as the model makes it.
        """
        window = self.retention.reach(True)
        held = tokens if window is None else min(tokens, self.retention.sink + window + self._rollback)
        beside = 0 if self.index is None else self.index.bytes_at(tokens, dim, itemsize)
        return 2 * held * token_bytes(self._kv, dim, itemsize) + beside, 0

    def whole(self, lengths: Tensor, columns: int) -> tuple[Stored, Stored]:
        """As `memory`, up to the column in which the longest row ends: where everything is kept, all of it is there."""
        return part(self._keys.filled, slice(None), 0, columns), part(self._values.filled, slice(None), 0, columns)

    @property
    def summaries(self) -> Tensor | None:
        """`[B, Hkv, M', R, D]`, what the index says of each sub-block."""
        return None if self.index is None else self.index.entries

    def append(self, k: Tensor, v: Tensor, step: Step) -> View:
        """Store the call's tokens and return all that its queries may see. What leaves the window is overwritten.

        Args:
            k: `[B, Hkv, T, D]`, rotated as it will be read, each row's real tokens first (`step.order`).
            v: `[B, Hkv, T, Dv]`, likewise.
            step: the call.
        """
        self._fit(step)
        if step.columns and (self._ring is None or step.tokens == 1):
            Store.write(self, k, v, step)
            return self._in_place(step)
        sink, ring, before = self.retention.sink, self._ring, None
        if step.columns and ring is not None:
            before = Before.of(self._keys, self._values, step, sink, ring)
        read = () if self._kv is None else (torch.empty_like(k), torch.empty_like(v))
        self._fill(k, v, step, None, read)
        k, v = straight((k, v), read)
        return View(k, v, step.pos if step.ragged else None) if before is None else before.then(k, v, sink)

    def write(self, k: Tensor, v: Tensor, step: Step, turns: ops.Turns | None = None) -> None:
        """Store the call's tokens before anything of it is read: those of a decode call in one operation.

        Args:
            k: `[B, Hkv, T, D]`, as in `append`.
            v: `[B, Hkv, T, Dv]`, likewise.
            step: the call, or the part of it that is stored now.
            turns: how the group's queries are turned to the stored keys.
        """
        self._fit(step)
        if self.k is None or not step.decodes or isinstance(self.index, Marks) or step.tokens > (self._ring or FEW):
            self._fill(k, v, step, turns)
            return
        bounds, sub = self._make_room(k, step)
        ops.append_pages(*self.memory, k, v, step.pos, self.retention.sink, self._ring, bounds, sub, step.first)

    def place(self, k: Tensor, step: Step) -> tuple[Place, View]:
        """Make room for a decode call of one token a row, which others store: say where, and what it sees then."""
        self._fit(step)
        return Place(self._ring, *self._make_room(k, step)), self._in_place(step)

    def prepare(self, step: Step) -> None:
        """Let nothing move while one-token calls follow that `step` has room for."""
        self._fit(step)
        self._reserve(step)
        if self.index is not None:
            self.index.prepare(step)

    def passed(self, columns: int) -> None:
        """Know that tokens were written until rows were up to `columns` long."""
        if self._ring is not None and columns > self.retention.sink + self._ring:
            self._lost = max(self._lost, columns - self._ring)

    def buffers(self) -> list[Any]:
        """What it holds on its device: a recorded call reads and writes it where it lies."""
        index = [] if self.index is None else self.index.buffers()
        return [self._keys.data, self._values.data, self.floor, *index, *self.kept.buffers()]

    def add_mass(self, ids: Tensor, mass: Tensor, block: int) -> None:
        """Tell the index how much attention keys got from the queries near them; arguments as `Marks.add`."""
        assert isinstance(self.index, Marks)
        self.index.add(ids, mass, block)

    def locate(self, ids: Tensor, block: int, step: Step) -> Tensor | None:
        """Where blocks lie in `memory`, in blocks; None: at their ids."""
        return None

    def crop(self, tokens: int, columns: int) -> None:
        """Check that the last `tokens` of `columns` columns can be taken back.

        Raises:
            ValueError: tokens that were overwritten would be seen again, or attention that they paid was counted.
        """
        if isinstance(self.index, Marks):
            self.index.crop(tokens)
        sink, window, end = self.retention.sink, self.retention.window, columns - tokens
        if window is None or max(sink, end - window + 1) >= min(end, self._lost):
            return
        raise ValueError(
            f"crop: expected at most {max(0, columns - window + 1 - self._lost)} tokens, because older ones have left "
            f"the window of {window} for good; got {tokens}. Call cache.activate_past_recording() before the tokens "
            f"come in: then {ROLLBACK} can be taken back. Or start a new cache."
        )

    def keep(self, index: Tensor) -> None:
        """Let go of all tokens but those in slots `index` `[B, N]`, which become the first N; memory stays in place."""
        assert self._ring is None and self.index is None
        for rows in (self._keys, self._values):
            rows.move_up(index)

    def record(self) -> None:
        """Hold `ROLLBACK` tokens beyond the window from the next call on, so that `crop` can take tokens back."""
        self._rollback = ROLLBACK

    def lend(self, to: Store, share: Callable[[Rows], Rows]) -> None:
        """Let an empty store, or this one, have what `share` makes of this one's rows."""
        to._keys, to._values = share(self._keys), share(self._values)

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`; pick: `[B']`, int64."""
        for owned in (self._keys, self._values, self.index, self.kept):
            if owned is not None:
                owned.map_rows(pick)
        if self.floor is not None and self.floor.shape[0] > 1:
            self.floor = self.floor.index_select(0, pick.to(self.floor.device))

    def state(self, columns: int, lengths: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers that `restore` needs, after `columns` columns, of which rows have `lengths` tokens."""
        held = columns if self.limit is None else min(columns, self.limit)
        tensors: dict[str, Tensor] = {} if self.floor is None else {"floor": self.floor}
        values = {"slots": self._keys.slots, "ring": self._ring, "lost": self._lost, "rollback": self._rollback}
        for name, rows in (("k", self._keys), ("v", self._values)):
            more, said = saved(part(rows.filled, slice(None), 0, held), name)
            tensors, values = {**tensors, **more}, {**values, **said}
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Become what `state` told of; an empty store only."""
        self.floor = tensors.get("floor")
        self._ring, self._lost, self._rollback = values["ring"], values["lost"], values["rollback"]
        for name, rows in (("k", self._keys), ("v", self._values)):
            stored = loaded(tensors, values, name)
            rows.reserve(stored, values["slots"])
            rows.write(stored, 0)

    # which token is where -----------------------------------------------------------------------------------------

    def _fit(self, step: Step) -> None:
        """Give the ring the size that this call needs, keeping what it holds."""
        reach = self.retention.reach(not step.decodes)
        size = None if reach is None else reach + self._rollback
        if size == self._ring:
            return
        old, self._ring = self._ring, size
        if reach is not None and old is not None and old < reach and step.columns:
            self.floor = (step.lengths - min(old, step.columns - self._lost))[:, None]  # a crop may leave fewer
        if self.k is None or old is None or size is None:
            return
        sink, slots = self.retention.sink, min(step.columns, self.retention.sink + size)
        if step.columns > sink + size:
            self._lost = max(self._lost, step.columns - size)
        index = slot_of(positions_in(step.lengths, slots, sink, size).clamp(min=0), sink, old)
        for rows in (self._keys, self._values):
            rows.keep(index.expand(self.k.shape[0], -1))

    # reading --------------------------------------------------------------------------------------------------------

    def _in_place(self, step: Step) -> View:
        """The filled slots, as they lie."""
        slots = step.width if self.limit is None else min(step.width, self.limit)
        k_pos = None
        if self._ring is not None and (step.ragged or slots < step.end):
            ring = (self.retention.sink, self._ring, slots)
            k_pos = step.once(("held", *ring), lambda: positions_in(step.lengths_after, slots, *ring[:2]))
        k, v = (part(rows.filled, slice(None), 0, slots) for rows in (self._keys, self._values))
        return View(k, v, k_pos) if step.tokens == 1 else View(decoded(k), decoded(v), k_pos)

    # writing --------------------------------------------------------------------------------------------------------

    def _make_room(self, k: Tensor, step: Step) -> tuple[Tensor | None, int]:
        self._reserve(step)
        assert not isinstance(self.index, Marks)
        return (None, 1) if self.index is None else (self.index.reserve(k, step), self.index.sub)

    def _fill(self, k: Tensor, v: Tensor, step: Step, turns: ops.Turns | None, read: tuple[Tensor, ...] = ()) -> None:
        ops.fill_pages([self.begin(k, v, step)], k, v, step.pos, step.first, read, step.columns == 0)
        if isinstance(self.index, Marks):
            self.index.follow(self._keys, k, step, turns)

    def begin(self, k: Tensor, v: Tensor, step: Step, heads: Tensor | None = None) -> ops.GroupFill:
        """Make room for tokens of a call, and say where they go; heads: as in `ops.GroupFill`."""
        self._fit(step)
        count = None if heads is None else heads.shape[0]
        if step.columns:
            self._reserve(step)
        else:
            size = self._room(self._keys, step)
            self._keys.begin(k, size, count)
            self._values.begin(v, size, count)
            self.passed(step.end)
        bounds, sub = None, 1
        if isinstance(self.index, Bounds):
            sub = self.index.sub
            bounds = self.index.reserve(k[:, :count], step) if step.columns else self.index.begin(k, step, count)
        return ops.GroupFill(*self.memory, self.retention.sink, self._ring, bounds, sub, heads)

    def _room(self, rows: Rows, step: Step) -> int:
        """Slots that there must be for a call."""
        size = room(rows.slots, step.reserved, PAGE)
        return size if self.limit is None else min(size, self.limit)

    def _reserve(self, step: Step) -> None:
        """Make room for a call's tokens beside those that are there."""
        for rows in (self._keys, self._values):
            rows.reserve(rows.filled, self._room(rows, step))
        self.passed(step.end)
