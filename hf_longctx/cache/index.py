"""What is kept beside the keys so that blocks can be scored unread; owned by the store whose keys it speaks of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ..kernels import ops
from ..plan import HeadPolicy, Summary
from .folding import Folding, Keys
from .marks import Marks
from .rows import PAGE, picked, room
from .step import Step


class Bounds:
    """Entries that follow from the keys alone: each sub-block that a call touches is summed up anew, as it is stored.

    Nothing is carried on from the entry before, so a crop leaves nothing behind that would be too wide.

    Args:
        summary: what an entry says.
        ahead: tokens to come for which there are entries: a choice may hold for them too.
    """

    local = False

    def __init__(self, summary: Summary, ahead: int) -> None:
        self._summary, self._ahead = cast(Folding, summary), ahead
        self._entries: Tensor | None = None
        self._used = 0

    @property
    def sub(self) -> int:
        """Tokens of a sub-block."""
        return self._summary.sub

    @property
    def entries(self) -> Tensor | None:
        """`[B, H, M', 2, D]`, one entry per sub-block of the longest row, and ahead; None before the first token."""
        return None if self._entries is None else self._entries[:, :, : self._used]

    @property
    def nbytes(self) -> int:
        """Bytes of the live tensors."""
        return 0 if self._entries is None else self._entries.nbytes

    def bytes_at(self, tokens: int, dim: int, itemsize: int) -> int:
        """Bytes of a row and head after `tokens` tokens, room for more aside."""
        return -(-tokens // self._summary.sub) * 2 * dim * itemsize

    def prepare(self, step: Step) -> None:
        """Make room for a call."""
        if self._entries is not None:
            self.reserve(self._entries[:, :, :0, 0], step)

    def buffers(self) -> list[Tensor | None]:
        """The live tensors."""
        return [self._entries]

    def follow(self, keys: Keys, k: Tensor, step: Step, turns: ops.Turns | None) -> None:
        """Take in a call whose keys are stored.

        Args:
            keys: the stored keys, this call's included.
            k: `[B, H, T, D]`, the call's own.
            step: the call.
            turns: not used.
        """
        self.reserve(k, step)
        if step.ragged and step.tokens == 1:
            self._fold_last(keys, step)
        elif step.ragged:
            for row, (first, count) in enumerate(step.spans):
                self._fold_run(keys, slice(row, row + 1), first, first + count)
        else:
            self._fold_run(keys, slice(None), step.columns, step.columns + step.tokens)

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`."""
        if self._entries is not None:
            self._entries = picked(self._entries, pick)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers that `restore` needs."""
        return {} if self._entries is None else {"entries": self._entries}, {"used": self._used}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Become what `state` told of."""
        self._entries, self._used = tensors.get("entries"), values["used"]

    def begin(self, k: Tensor, step: Step, heads: int | None = None) -> Tensor:
        """As `reserve`, of an index that says nothing yet and of so many heads: what lies there is not to be read."""
        size = self._size(step)
        if self._entries is None or self._entries.shape[2] < size:
            self._entries = k.new_empty(k.shape[0], k.shape[1] if heads is None else heads, size, 2, k.shape[3])
        return self._entries

    def _size(self, step: Step) -> int:
        """Entries that there must be for a call."""
        self._used = -(-(step.width + self._ahead) // self._summary.sub)
        have = 0 if self._entries is None else self._entries.shape[2]
        return room(have, max(self._used, step.expected // self._summary.sub), max(1, PAGE // self._summary.sub))

    def reserve(self, k: Tensor, step: Step) -> Tensor:
        """Make room for a call: `[B, H, >= M', 2, D]`; what holds no key yet is out of bounds on both sides."""
        have, size = 0 if self._entries is None else self._entries.shape[2], self._size(step)
        if self._entries is not None and size == have:
            return self._entries
        none = torch.zeros(1, dtype=torch.bool, device=k.device)
        empty = self._summary.fold(k.new_zeros(1, k.shape[3]), none, None)
        grown = empty.repeat(*k.shape[:2], size, 1, 1)
        if self._entries is not None:
            grown[:, :, :have] = self._entries
        self._entries = grown
        return grown

    def _fold_run(self, keys: Keys, rows: slice, first: int, end: int) -> None:
        """The sub-blocks of positions `first` to `end - 1`, for rows that are alike."""
        assert self._entries is not None
        sub = self._summary.sub
        start, whole = first // sub, end // sub
        if whole > start:
            k = keys.span(rows, start * sub, whole * sub)
            k = k.view(*k.shape[:2], whole - start, sub, k.shape[3])
            self._entries[rows, :, start:whole] = self._summary.fold(k, None, None)
        if end > max(first, whole * sub):
            self._entries[rows, :, whole] = self._summary.fold(keys.span(rows, whole * sub, end), None, None)

    def _fold_last(self, keys: Keys, step: Step) -> None:
        """The last sub-block of each row, wherever that is."""
        assert self._entries is not None
        sub, ends = self._summary.sub, step.lengths_after.expand(self._entries.shape[0])
        last = (ends - 1).clamp(min=0) // sub
        pos = last[:, None] * sub + torch.arange(sub, device=step.device)
        filled = pos < ends[:, None]
        k = keys.take(torch.where(filled, pos, 0))
        row = torch.arange(len(last), device=step.device)
        self._entries[row, :, last] = self._summary.fold(k, filled[:, None], None)


Index = Bounds | Marks


def index_of(policy: HeadPolicy) -> Index | None:
    """The index that a policy's selectors read, or None."""
    summary = policy.summary
    if summary is None:
        return None
    selector = policy.decode or policy.prefill
    assert selector is not None
    return Marks(summary, selector) if summary.local else Bounds(summary, selector.refresh_every - 1)
