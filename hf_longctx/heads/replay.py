"""What is computed of lessons, recorded on a GPU: once for each length, one launch in place of thousands after that."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..graph import RECORDERS
from ..recording import Graph
from .lessons import Lesson


class Replay:
    """A function of a lesson; the first lesson of a length is computed as it is, the second recorded, others replayed.

    Args:
        run: the function; what it reads beside the lesson must stay where it is.
        device: where lessons are read; on one that records nothing every lesson is computed as it is.

    Attributes:
        reason: why nothing is recorded any more, or None.
    """

    def __init__(self, run: Callable[[Lesson], Tensor], device: torch.device) -> None:
        self._run, self._device = run, device
        self._lessons: dict[int, Lesson] = {}
        self._graphs: dict[int, Graph] = {}
        self._pool: list[Any] = []
        self.reason: str | None = None

    def __call__(self, lesson: Lesson) -> Tensor:
        """What the function says of a lesson, in memory of its own."""
        recorder, tokens = RECORDERS.get(self._device.type), len(lesson.ids)
        if recorder is None or self.reason is not None:
            return self._run(lesson)
        own = self._lessons.get(tokens)
        if own is None:
            own = self._lessons[tokens] = Lesson(*(x.to(self._device, copy=True) for x in (lesson.ids, lesson.shares)))
            out: Tensor = recorder.first(partial(self._run, own), self._device)
            return out.clone()
        own.ids.copy_(lesson.ids)
        own.shares.copy_(lesson.shares)
        if tokens not in self._graphs:
            try:
                self._graphs[tokens] = recorder(partial(self._run, own), self._device, self._pool)
            except RuntimeError as error:
                self.reason = str(error).strip().partition("\n")[0]
                self._graphs.clear()
                return self._run(lesson)
        replayed: Tensor = self._graphs[tokens].replay()
        return replayed.clone()
