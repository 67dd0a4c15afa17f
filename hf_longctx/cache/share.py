"""Some rows of a batch by themselves, in the memory of the whole cache: a prompt of many rows is read so."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from .cache import LongContextCache
from .ledger import Ledger
from .rows import PAGE, Rows, Stored, part, room
from .store import Store


class SharedRows(Rows):
    """Rows `first` to `last - 1` of the `total` that others have or will have."""

    def __init__(self, whole: Rows, first: int, last: int, total: int) -> None:
        super().__init__(None)
        self.bits = whole.bits
        self._whole, self._first, self._last, self._total = whole, first, last, total

    @property
    def nbytes(self) -> int:
        """Their part of the bytes, once there are any."""
        return self._whole.nbytes * (self._last - self._first) // self._total

    def begin(self, x: Tensor, slots: int, heads: int | None = None) -> None:
        """Make room in the whole, unless there is."""
        whole = self._whole
        heads, dim = x.shape[1] if heads is None else heads, x.shape[3]
        if whole.data is not None and not _holds(whole.data, (self._total, heads, dim), x):
            whole.data = None  # made for something else than what has come
        whole.begin(x[:1, :heads].expand(self._total, -1, -1, -1), slots)
        self.data = part(self._whole.filled, slice(self._first, self._last), 0, self._whole.slots)

    def reserve(self, like: Stored, slots: int) -> None:
        """Nothing to do: there was room for the whole prompt from the start."""
        assert slots <= self.slots


def shareable(cache: LongContextCache) -> bool:
    """True for an empty cache whose stores hold keys and values of all tokens and nothing that follows from them."""
    stores = [store for layer in cache.stacks for _, store in layer.stores]
    plain = all(type(store) is Store and store.index is None and store.limit is None for store in stores)
    return plain and not cache.ledger.columns and cache.angles is None and not cache.floors


def begin(cache: LongContextCache, rows: int, like: Sequence[Tensor]) -> None:
    """Make room for all rows before anything is computed: between what layers compute it would lie in pieces.

    Args:
        cache: that is `shareable`.
        rows: of the batch.
        like: of each layer `[1, 1, 1, D]`, of the dtype and on the device of its keys.
    """
    slots = room(0, max(cache.expected, cache.asked), PAGE)
    for layer, x in zip(cache.stacks, like, strict=True):
        for group, store in layer.stores:
            assert isinstance(store, Store)
            store.lend(store, partial(_begun, x=x.expand(rows, len(group.kv_heads), 1, -1), slots=slots))


def _begun(rows: Rows, x: Tensor, slots: int) -> Rows:
    rows.begin(x, slots)
    return rows


def _holds(data: Stored, sizes: tuple[int, int, int], x: Tensor) -> bool:
    """True if what a store has is for tokens like x in so many rows, heads and channels."""
    shape = data.shape
    return (shape[0], shape[1], shape[3]) == sizes and data.dtype == x.dtype and data.device == x.device


def lend(cache: LongContextCache, first: int, last: int, total: int) -> LongContextCache:
    """A cache of rows `first` to `last - 1` of `total`; `join` counts its tokens. For what is `shareable`."""
    made = LongContextCache(cache.plan)
    made.expected, made.asked = cache.expected, cache.asked
    for mine, other in zip(cache.stacks, made.stacks, strict=True):
        for (_, own), (_, store) in zip(mine.stores, other.stores, strict=True):
            assert isinstance(own, Store) and isinstance(store, Store)
            own.lend(store, lambda rows: SharedRows(rows, first, last, total))
    return made


def join(cache: LongContextCache, parts: Sequence[LongContextCache]) -> None:
    """Count what the rows of a cache have read one part after the other; parts: all of its rows in their order."""
    ledger, ledgers = cache.ledger, [one.ledger for one in parts]
    ledger.rows, ledger.columns = sum(one.rows for one in ledgers), ledgers[0].columns
    ledger.lengths = _joined(ledgers, [one.lengths for one in ledgers])
    ledger.tail = _joined(ledgers, [one.tail for one in ledgers])
    ledger.loose = any(one.loose for one in ledgers)
    for one in ledgers:
        for key, counts in one.tally.items():
            ledger.tally[key] = counts + ledger.tally.get(key, 0)
    for layer in cache.stacks:
        layer.is_initialized = True
    cache.measure()


def _joined(ledgers: Sequence[Ledger], found: Sequence[Tensor | None]) -> Tensor | None:
    """`[B]`, of all rows; those of which nothing is known have no padding."""
    known = next((x for x in found if x is not None), None)
    if known is None:
        return None
    every = [known.new_full((1,), one.columns) if x is None else x for one, x in zip(ledgers, found, strict=True)]
    return torch.cat([x.to(known.device).expand(one.rows) for one, x in zip(ledgers, every, strict=True)])
