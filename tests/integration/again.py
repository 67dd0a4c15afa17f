"""A stand-in for a CUDA graph where there is no GPU: the recorded call runs again, and knows no newer length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_longctx import graph


class Again:
    """A recorded call that is run again on its inputs; the host knows of the cache what it knew when recording."""

    nbytes = 1
    recorded = replayed = 0

    def __init__(self, run: Callable[[], Any], device: torch.device, pool: list[Any]) -> None:
        self._run = run
        self._cache = run.args[3].cache  # type: ignore[attr-defined]
        self._known = self._count()
        Again.recorded += 1

    @staticmethod
    def first(run: Callable[[], Any], device: torch.device) -> Any:
        """As `Graph.first`."""
        return run()

    def replay(self) -> Any:
        """As `Graph.replay`."""
        Again.replayed += 1
        now = self._count()
        self._set(self._known)
        try:
            return self._run()
        finally:
            self._set(now)

    def _kept(self) -> list[Any]:
        return [store.kept for layer in self._cache.stacks for _, store in layer.stores]

    def _count(self) -> tuple[int, list[int | None]]:
        return self._cache.ledger.columns, [kept.since for kept in self._kept()]

    def _set(self, count: tuple[int, list[int | None]]) -> None:
        self._cache.ledger.columns = count[0]
        for kept, since in zip(self._kept(), count[1], strict=True):
            kept.since = since


@contextmanager
def recorders(record: Any = Again) -> Iterator[type[Again]]:
    """Record calls on the CPU inside the block."""
    Again.recorded = Again.replayed = 0
    graph.RECORDERS["cpu"] = record
    try:
        yield Again
    finally:
        del graph.RECORDERS["cpu"]
