"""Keys or values in slots, in the format in which they are stored: as the model makes them, or quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.types import parts
from ..plan import KVFormat
from .place import slot_of
from .step import Step

PAGE = 64
"""Tokens by which a store grows at least; a page of one row and KV head is contiguous."""

GROWTH = 32
"""A full store grows by one part in so many: the room that it holds for tokens to come stays below 4 % of its bytes."""

Stored = Tensor | ops.Packed
"""`[B, H, S, D]` in either format."""


@dataclass(frozen=True)
class View:
    """Keys and values that a call's queries may see, sinks first; of several tokens in the order of positions.

    Args:
        k: `[B, Hkv, S, D]`, as stored where there is one query a row.
        v: `[B, Hkv, S, Dv]`, likewise.
        k_pos: `[B or 1, S]`, int64, -1 where empty; None: columns are positions, filled up to the row's last token.
    """

    k: Stored
    v: Stored
    k_pos: Tensor | None


def room(have: int, need: int, page: int) -> int:
    """The size to which something of size `have` grows when it must hold `need`: whole pages, and some to come."""
    return have if need <= have else -(-max(need, have + have // GROWTH) // page) * page


def token_bytes(kv: KVFormat | None, dim: int, itemsize: int) -> int:
    """Bytes of a token and head with `dim` channels of `itemsize` bytes; a format adds its scale and zero."""
    return dim * itemsize if kv is None else dim * kv.bits // 8 + 4


def picked(x: Tensor, pick: Tensor) -> Tensor:
    """The rows `x[pick]`; in place where there are as many as before, so that what was recorded still finds them."""
    rows = x.index_select(0, pick.to(x.device))
    return x.copy_(rows) if rows.shape == x.shape else rows


def each(x: Stored, change: Callable[[Tensor], Tensor]) -> Stored:
    """The same format after `change` of every tensor `[B, H, S, ?]`."""
    if isinstance(x, Tensor):
        return change(x)
    payload, scale, zero = map(change, parts(x))
    return replace(x, payload=payload, scale=scale[..., 0], zero=zero[..., 0])


def part(x: Stored, rows: slice, first: int, last: int) -> Stored:
    """Some tokens of some rows, sharing memory with `x`."""
    return each(x, lambda tensor: tensor[rows, :, first:last])


def saved(x: Stored, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of either format by name, and what else is needed to make it again (`loaded`)."""
    bits = None if isinstance(x, Tensor) else x.bits
    tensors = {f"{name}.{i}": tensor for i, tensor in enumerate(parts(x))}
    return tensors, {f"{name}.bits": bits, f"{name}.dtype": str(x.dtype).removeprefix("torch.")}


def loaded(tensors: Mapping[str, Tensor], values: Mapping[str, Any], name: str) -> Stored:
    """What `saved` took apart."""
    first, bits = tensors[f"{name}.0"], values[f"{name}.bits"]
    if bits is None:
        return first
    scale, zero = (tensors[f"{name}.{i}"][..., 0] for i in (1, 2))
    return ops.Packed(first, scale, zero, bits, getattr(torch, values[f"{name}.dtype"]))


def decoded(x: Stored) -> Tensor:
    """The values: `[B, H, S, D]`, in the model's dtype."""
    return x if isinstance(x, Tensor) else ops.decode_kv(x)


def straight(fresh: tuple[Tensor, Tensor], read: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What is read of fresh keys and values, none if just those; gradients pass as if a format did not round."""
    if not read:
        return fresh
    keys, values = (_Straight.apply(x, y) if x.requires_grad else y for x, y in zip(fresh, read, strict=True))  # type: ignore[no-untyped-call]
    return keys, values


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Tensor) -> Tensor:
        return read

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Rows:
    """Keys or values of B rows and H heads, in slots.

    Attributes:
        data: `[B, H, slots, D]`, or None before the first token.
        bits: of a number; None: those of the model's dtype.
    """

    def __init__(self, kv: KVFormat | None) -> None:
        self.data: Stored | None = None
        self.bits = None if kv is None else kv.bits

    @property
    def slots(self) -> int:
        """Tokens of a row that there is room for."""
        data = self.data
        return 0 if data is None else (data if isinstance(data, Tensor) else data.payload).shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the live tensors."""
        return 0 if self.data is None else self.data.nbytes

    @property
    def filled(self) -> Stored:
        """The tensors; there must be some."""
        assert self.data is not None
        return self.data

    def encode(self, x: Tensor) -> Stored:
        """Fresh values in the format; whatever is read of them is what this holds."""
        return x if self.bits is None else ops.encode_kv(x.detach(), self.bits)

    def begin(self, x: Tensor, slots: int, heads: int | None = None) -> None:
        """Make room for `slots` tokens a row like those of `x`; what lies there is not to be read.

        Args:
            x: `[B, H, T, D]`.
            slots: of a row.
            heads: of them; None: H.
        """
        if self.data is not None and slots <= self.slots:
            return
        shape = (x.shape[0], x.shape[1] if heads is None else heads, slots)
        if self.bits is None:
            self.data = x.new_empty(*shape, x.shape[3])
            return
        payload = x.new_empty(*shape, x.shape[3] * self.bits // 8, dtype=torch.uint8)
        scale, zero = x.new_empty(*shape, dtype=torch.float16), x.new_empty(*shape, dtype=torch.float16)
        self.data = ops.Packed(payload, scale, zero, self.bits, x.dtype)

    def reserve(self, like: Stored, slots: int) -> None:
        """Make room for `slots` tokens a row, keeping what is there; `like` says what a token is like."""
        if slots <= self.slots:
            return
        grown = each(like, lambda x: x.new_zeros(*x.shape[:2], slots, x.shape[3]).detach())
        if self.data is not None:
            for new, old in zip(parts(grown), parts(self.data), strict=True):
                new[:, :, : old.shape[2]] = old
        self.data = grown

    def write(
        self, fresh: Stored, slots: Tensor | int, written: Tensor | None = None, rows: slice = slice(None)
    ) -> None:
        """Write tokens in place; arguments as `ops.append`, for the rows `rows`."""
        for store, x in zip(parts(self.filled), parts(fresh), strict=True):
            ops.append(store[rows], x, slots, written)

    def put(self, fresh: Stored, step: Step, sink: int, ring: int | None) -> None:
        """Write the tokens of a call where they belong (`slot_of`); with a ring, the last of them stay.

        Args:
            fresh: `[B, H, T, D]`, each row's real tokens first.
            step: the call.
            sink: first tokens, which have slots of their own.
            ring: slots that go round beyond them; None: every token has a slot of its own.
        """
        if not step.ragged:
            self._put_run(slice(None), fresh, step.columns, step.tokens, sink, ring)
        elif step.tokens == 1:
            self.write(fresh, slot_of(step.lengths[:, None], sink, ring), step.real)
        elif step.room is not None and step.pos.shape[0] == 1:  # only the device knows where
            for store, x in zip(parts(self.filled), parts(fresh), strict=True):
                store.index_copy_(2, slot_of(step.pos[0], sink, ring), x.to(store.dtype))
        else:
            for row, (first, count) in enumerate(step.spans):
                self._put_run(slice(row, row + 1), fresh, first, count, sink, ring)

    def _put_run(self, rows: slice, fresh: Stored, first: int, count: int, sink: int, ring: int | None) -> None:
        """Write `count` tokens from position `first` on, for rows that are alike: runs of slots without a jump."""
        last = first + count
        runs = [(first, min(sink, last), first)]
        start = max(first, sink) if ring is None else max(first, sink, last - ring)
        while start < last:
            slot = start if ring is None else sink + (start - sink) % ring
            stop = last if ring is None else min(last, start + sink + ring - slot)
            runs.append((start, stop, slot))
            start = stop
        for start, stop, slot in runs:
            if start < stop:
                self.write(part(fresh, rows, start - first, stop - first), slot, rows=rows)

    def take(self, index: Tensor) -> Tensor:
        """The values in slots `index` `[B, N]`: `[B, H, N, D]`."""
        return decoded(each(self.filled, lambda x: ops.take_tokens(x, index)))

    def span(self, rows: slice, first: int, last: int) -> Tensor:
        """The values in slots `first` to `last - 1` of some rows; without a format of their own, as they lie."""
        return decoded(part(self.filled, rows, first, last))

    def keep(self, index: Tensor) -> None:
        """Replace the slots by `slots[index]`; index: `[B, N]`."""
        self.data = each(self.filled, lambda x: ops.take_tokens(x, index))

    def move_up(self, index: Tensor) -> None:
        """Put slots `index` `[B, N]` in the first N, in the memory that is there."""
        count, alike = index.shape[1], index.shape[0] == 1
        for store in parts(self.filled):
            moved = store.index_select(2, index[0]) if alike else ops.take_tokens(store, index)
            store[:, :, :count] = moved

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`; pick: `[B']`, int64."""
        if self.data is not None:
            changed = each(self.data, lambda x: picked(x, pick))
            self.data = self.data if changed.shape == self.data.shape else changed
