"""The next token of each row, by a model's generation settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class Sampler:
    """Greedy, or drawn at a temperature; repetition penalty, top-k and top-p as `generate()` has them.

    Args:
        settings: what is read of them: `do_sample`, `temperature`, `top_k`, `top_p`, `repetition_penalty`.
        seed: of the draws.
        banned: tokens that stand for pictures, which no answer may hold.
    """

    def __init__(self, settings: GenerationConfig, seed: int, banned: Sequence[int]) -> None:
        self._banned = list(banned)
        self._draws = bool(settings.do_sample)
        penalty = settings.repetition_penalty
        made: list[Any] = []
        if penalty is not None and penalty != 1.0:
            made.append(RepetitionPenaltyLogitsProcessor(penalty=float(penalty)))
        if self._draws:
            if settings.temperature not in (None, 1.0):
                made.append(TemperatureLogitsWarper(float(settings.temperature)))
            if settings.top_k:
                made.append(TopKLogitsWarper(int(settings.top_k)))
            if settings.top_p is not None and settings.top_p < 1.0:
                made.append(TopPLogitsWarper(float(settings.top_p)))
        self._steps = LogitsProcessorList(made)
        self._remembers = any(isinstance(step, RepetitionPenaltyLogitsProcessor) for step in made)
        self.generator = torch.Generator().manual_seed(seed)

    def begin(self, said: Callable[[], Sequence[Sequence[int]]], rows: int, tokens: int, device: torch.device) -> Draws:
        """What picks the tokens of one answer of each row; all that comes from the host goes to the device here.

        Args:
            said: gives the tokens of each row that a repetition penalty remembers.
            rows: how many there are.
            tokens: most of an answer.
            device: of the logits.
        """
        memory = None
        if self._remembers:
            memory = [torch.tensor([list(before)], dtype=torch.int64, device=device) for before in said()]
        banned = torch.tensor(self._banned, dtype=torch.int64, device=device)
        heights = None
        if self._draws:
            heights = torch.rand(tokens, rows, 1, dtype=torch.float64, generator=self.generator).to(device)
        return Draws(self._steps, banned, memory, heights)


@dataclass
class Draws:
    """The tokens of one answer of each row, one after the other; nothing waits for the device.

    Args:
        steps: what is done to logits.
        banned: `[N]`, int64, tokens that are never picked.
        memory: of each row `[1, N]`, int64, tokens that a repetition penalty remembers; None: there is none.
        heights: `[tokens, B, 1]`, float64 in [0, 1), where to look in the distributions; None: the likeliest tokens.
        count: tokens so far.
    """

    steps: LogitsProcessorList
    banned: Tensor
    memory: list[Tensor] | None
    heights: Tensor | None
    count: int = 0

    def next(self, logits: Tensor) -> Tensor:
        """The next token of each row: `[B]`, int64, from logits `[B, V]`."""
        logits = logits.index_fill(1, self.banned, float("-inf"))
        if self.steps:
            rows = []
            for number, row in enumerate(logits.float()):
                ids: Any = self.banned[None, :0] if self.memory is None else self.memory[number]
                rows.append(self.steps(ids, cast(Any, row[None]))[0])
            logits = torch.stack(rows)
        if self.heights is None:
            picked = logits.argmax(-1)
        else:
            below = logits.float().softmax(-1).double().cumsum(-1)
            picked = torch.searchsorted(below, self.heights[self.count] * below[:, -1:], right=True)[:, 0]
        self.count += 1
        if self.memory is not None:
            self.memory = [torch.cat((x, one.view(1, 1)), 1) for x, one in zip(self.memory, picked, strict=True)]
        return picked


class Fetched:
    """Integers of a device on their way to the host: what is launched meanwhile need not be done when they are read."""

    def __init__(self, x: Tensor) -> None:
        self._host = x.to("cpu", non_blocking=True)
        self._there = None
        if x.is_cuda:
            self._there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._there.record(torch.cuda.current_stream(x.device))

    def get(self) -> list[int]:
        """The integers; waits for them alone."""
        if self._there is not None:
            self._there.synchronize()
        out: list[int] = self._host.tolist()
        return out
