"""Entries of blocks that follow from the attention that their keys got; owned by the store whose keys they speak of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.types import parts
from ..plan import Selector, Summary
from .folding import Folding, Keys, Packing
from .rows import PAGE, Stored, decoded, each, loaded, part, picked, room, saved
from .step import Step


class Marks:
    """Entries of blocks that have left the local window of every query to come: nobody adds to what they say any more.

    With each call the entries of the last few such blocks are made, as many as may have left since the call before, so
    that there is nothing to remember about a row. Where it matters how much attention keys got from the queries near
    them, that lies in a ring by position until then.

    Args:
        summary: what an entry says.
        selector: says how wide the local window is, and the most tokens of one write.
    """

    local = True

    def __init__(self, summary: Summary, selector: Selector) -> None:
        self._summary, self._subs = cast(Folding, summary), summary.block // summary.sub
        self._near, self._most, self._ahead = selector.local, selector.scorer.q_block, selector.refresh_every - 1
        self._ring = self._near + 2 * summary.block + 2 * self._most
        self._bits = summary.bits if isinstance(summary, Packing) else None
        self._entries: Stored | None = None  # [B, H, M', D]
        self._mass: Tensor | None = None  # only if the summary weighs
        self._used = 0  # blocks
        self._before = 0  # tokens of the call before

    @property
    def entries(self) -> Tensor | None:
        """`[B, H, M', 1, D]`, of each sub-block of the longest row, and ahead; of blocks near its end anything."""
        if self._entries is None:
            return None
        return decoded(part(self._entries, slice(None), 0, self._used * self._subs))[:, :, :, None]

    @property
    def nbytes(self) -> int:
        """Bytes of the live tensors."""
        return sum(x.nbytes for x in (self._entries, self._mass) if x is not None)

    def bytes_at(self, tokens: int, dim: int, itemsize: int) -> int:
        """Bytes of a row and head after `tokens` tokens, room for more aside."""
        blocks = -(-tokens // self._summary.block)
        ring = min(self._ring, blocks * self._summary.block) * 4 if self._summary.weighs else 0
        each_entry = dim * itemsize if self._bits is None else dim * self._bits // 8 + 4
        return blocks * self._subs * each_entry + ring

    def prepare(self, step: Step) -> None:
        """Make room for a call."""
        if self._entries is not None:
            rows, heads, _, dim = self._entries.shape
            like = torch.empty(rows, heads, 0, dim, dtype=self._entries.dtype, device=self._entries.device)
            self._reserve(like, -(-(step.width + self._ahead) // self._summary.block))

    @property
    def behind(self) -> bool:
        """True if the next call has more entries to make than one that follows a call of a token may have."""
        return self._before > self._summary.block

    def buffers(self) -> list[Any]:
        """What is live."""
        return [self._entries, self._mass]

    def follow(self, keys: Keys, k: Tensor, step: Step, turns: ops.Turns | None) -> None:
        """Make the entries of blocks that no query from this call on has near, then take in the call.

        Args:
            keys: the stored keys.
            k: `[B, H, T, D]`, the call's own.
            step: the call.
            turns: how queries are turned: entries are turned back to position 0 if far keys have one distance.
        """
        assert step.tokens <= self._most or step.end <= self._near  # none is closed before these have been read
        count = self._newly_closed(step)
        self._used = -(-(step.width + self._ahead) // self._summary.block)
        self._reserve(k, max(self._used, count))
        if count:
            self._fold_closed(keys, step, turns, count)
        if self._mass is not None:
            own = step.lengths[:, None, None] + torch.arange(step.tokens, device=step.device)
            self._mass.scatter_(2, (own % self._ring).expand(*k.shape[:3]), 0.0)
        self._before = step.tokens

    def add(self, ids: Tensor, mass: Tensor, block: int) -> None:
        """Add to the attention of the keys of some blocks.

        Args:
            ids: `[B, Hs, N, K]`, int, blocks; -1 for none.
            mass: `[B, H, N, K * block]`, float32, zero for keys that are not near and where there is no key.
            block: tokens of a block.
        """
        assert self._mass is not None
        pos = ids.long()[..., None] * block + torch.arange(block, device=ids.device)
        slots = (
            pos.flatten(2).expand(-1, mass.shape[1], -1) % self._mass.shape[2]
        )  # what is far adds zero to whom it hits
        self._mass.scatter_add_(2, slots, mass.flatten(2))

    def crop(self, tokens: int) -> None:
        """Check that the last `tokens` tokens can be taken back.

        Raises:
            ValueError: their attention was counted, or they made an entry.
        """
        if tokens and self._summary.weighs:
            raise ValueError(
                f"crop: expected 0 tokens to take back, because the representatives of blocks have seen the attention "
                f"of them all; got {tokens}. Start a new cache, or use a selector that scores by the keys alone."
            )
        if tokens >= self._near:
            raise ValueError(
                f"crop: expected at most {self._near - 1} tokens to take back, because blocks before the local window "
                f"have been summed up; got {tokens}. Start a new cache."
            )

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`."""
        if self._entries is not None:
            changed = each(self._entries, lambda x: picked(x, pick))
            self._entries = self._entries if changed.shape == self._entries.shape else changed
        if self._mass is not None:
            self._mass = picked(self._mass, pick)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers that `restore` needs."""
        tensors, about = ({}, {}) if self._entries is None else saved(self._entries, "entries")
        if self._mass is not None:
            tensors["mass"] = self._mass
        return tensors, {**about, "used": self._used, "before": self._before}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Become what `state` told of."""
        self._entries = loaded(tensors, values, "entries") if "entries.0" in tensors else None
        self._mass = tensors.get("mass")
        self._used, self._before = values["used"], values["before"]

    def _newly_closed(self, step: Step) -> int:
        """Most blocks that a row may have closed since the call before."""
        block = self._summary.block
        if step.ragged:
            return -(-self._before // block)
        now, then = (max(0, end - self._near + 1) // block for end in (step.columns, step.columns - self._before))
        return now - then

    def _reserve(self, k: Tensor, size: int) -> None:
        """Make room for so many blocks."""
        have = 0 if self._entries is None else self._entries.shape[2] // self._subs
        size = room(have, size, max(1, PAGE // self._summary.block))
        if size == have:
            return
        like = k if self._bits is None else self._stored(k.new_zeros(1, 1, 1, k.shape[3]))
        grown = each(like, lambda x: x.new_zeros(*k.shape[:2], size * self._subs, x.shape[3]))
        if self._entries is not None:
            for new, old in zip(parts(grown), parts(self._entries), strict=True):
                new[:, :, : old.shape[2]] = old
        self._entries = grown
        if self._summary.weighs:
            dtype = torch.promote_types(k.dtype, torch.float32)
            slots = min(self._ring, size * self._summary.block)  # a short text has not been round yet
            mass = torch.zeros(*k.shape[:2], slots, dtype=dtype, device=k.device)
            if self._mass is not None:
                mass[:, :, : self._mass.shape[2]] = self._mass
            self._mass = mass

    def _fold_closed(self, keys: Keys, step: Step, turns: ops.Turns | None, count: int) -> None:
        """The last `count` closed blocks of each row."""
        assert self._entries is not None
        (rows, heads), summary = self._entries.shape[:2], self._summary
        lap = None if turns is None or turns.clamp is None else (turns.lap, turns.offset)
        key = ("closed", summary.block, self._subs, self._near, self._ring, count, lap)
        closed: _Closed = step.once(key, lambda: self._closed(step, turns, count))
        k = keys.take(closed.pos.expand(rows, -1))
        if turns is not None and turns.clamp is not None and turns.inv_freq is not None:
            k = ops.rotate(k, closed.back, turns.inv_freq, turns.interleaved)
        runs = (rows, heads, count * self._subs, summary.sub)
        mass = None if self._mass is None else self._mass.gather(2, closed.slots.expand(rows, heads, -1)).view(runs)
        made = self._stored(summary.fold(k.view(*runs, -1), None, mass)[:, :, :, 0])
        for old, new in zip(parts(self._entries), parts(made), strict=True):
            index = closed.ids[:, None, :, None].expand(*new.shape)
            if closed.done is not None:
                new = torch.where(closed.done[:, None, :, None], new, old.gather(2, index))
            old.scatter_(2, index, new)

    def _stored(self, x: Tensor) -> Stored:
        """Entries `[B, H, n, D]` as they are held."""
        return x if self._bits is None else ops.encode_kv(x, self._bits)

    def _closed(self, step: Step, turns: ops.Turns | None, count: int) -> _Closed:
        sub, within = self._summary.sub, torch.arange(self._summary.sub, device=step.device)
        closed = (step.lengths[:, None] - self._near + 1).clamp(min=0) // self._summary.block * self._subs
        ids = (closed - count * self._subs).clamp(min=0) + torch.arange(count * self._subs, device=step.device)
        done = ids < closed
        pos = (torch.where(done, ids, 0)[..., None] * sub + within).flatten(1)
        back = -pos if turns is None else turns.lap * turns.laps(pos) - pos
        return _Closed(ids, done if step.ragged else None, pos, (pos % self._ring)[:, None], back)


@dataclass(frozen=True)
class _Closed:
    """The sub-blocks of a store whose entries are made in a call: the same in every layer.

    Args:
        ids: `[B or 1, n]`, int64.
        done: `[B or 1, n]`, bool, False where a row has fewer; None: no row has.
        pos: `[B or 1, n * sub]`, int64, their positions.
        slots: `[B or 1, 1, n * sub]`, int64, where their attention lies in the ring.
        back: `[B or 1, n * sub]`, int64, how far their keys are turned to stand at position 0.
    """

    ids: Tensor
    done: Tensor | None
    pos: Tensor
    slots: Tensor
    back: Tensor
