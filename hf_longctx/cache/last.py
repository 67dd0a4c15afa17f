"""The last step of a cache is taken back: of a text that had ended when it was launched."""

from __future__ import annotations

from .cache import LongContextCache
from .marks import Marks
from .store import Store


def can_forget(cache: LongContextCache) -> bool:
    """True if nothing tells of a step that was taken back: all is kept, and what is said of keys follows from them."""
    stores = [store for layer in cache.stacks for _, store in layer.stores]
    plain = all(type(store) is Store and store.limit is None and not isinstance(store.index, Marks) for store in stores)
    return plain and cache.angles is None


def can_crop(cache: LongContextCache) -> bool:
    """True if `cache.crop(-1)` is possible after a step: windows still hold what it looks at."""
    return not any(isinstance(store.index, Marks) for layer in cache.stacks for _, store in layer.stores)


def take_back(cache: LongContextCache) -> None:
    """Forget the last step, of one token a row, all but blocks that it read (`Ledger.tally`).

    Of a cache that cannot be cropped the lengths alone are put right: nobody reads it after `generate`.
    """
    kept = [store.kept for layer in cache.stacks for _, store in layer.stores]
    since = [each.since for each in kept]
    ledger = cache.ledger
    if can_crop(cache):
        cache.crop(-1)
        for each, columns in zip(kept, since, strict=True):
            each.since = columns if columns is not None and columns < ledger.columns else None
        return
    ledger.columns -= 1
    ledger.lengths, ledger.tail = (None if x is None else x - 1 for x in (ledger.lengths, ledger.tail))
