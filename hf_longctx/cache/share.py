"""Some rows of a batch by themselves, in the memory of the whole cache: a prompt of many rows is read so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cache import LongContextCache
from .ledger import Ledger
from .rows import Rows, Stored, part
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

    def begin(self, x: Tensor, slots: int) -> None:
        """Make room in the whole, unless other rows have done so."""
        self._whole.begin(x[:1].expand(self._total, -1, -1, -1), slots)
        self.data = part(self._whole.filled, slice(self._first, self._last), 0, self._whole.slots)

    def reserve(self, like: Stored, slots: int) -> None:
        """Nothing to do: there was room for the whole prompt from the start."""
        assert slots <= self.slots


def shareable(cache: LongContextCache) -> bool:
    """True for an empty cache whose stores hold keys and values of all tokens and nothing that follows from them."""
    stores = [store for layer in cache.stacks for _, store in layer.stores]
    plain = all(type(store) is Store and store.index is None and store.limit is None for store in stores)
    return plain and not cache.ledger.columns and cache.angles is None and not cache.floors


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
