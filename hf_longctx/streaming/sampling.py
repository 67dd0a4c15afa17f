"""The next token of each row, by a model's generation settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        self.generator = torch.Generator().manual_seed(seed)

    def next(self, logits: Tensor, said: Callable[[], Sequence[Sequence[int]]]) -> list[int]:
        """The next token of each row.

        Args:
            logits: `[B, V]`.
            said: gives the tokens of each row that a repetition penalty remembers.
        """
        logits = logits.clone()
        logits[:, self._banned] = float("-inf")
        if self._steps:
            rows = []
            for row, before in zip(logits.float(), said(), strict=True):
                ids: Any = torch.tensor([list(before)], dtype=torch.int64, device=logits.device)
                rows.append(self._steps(ids, cast(Any, row[None]))[0])
            logits = torch.stack(rows)
        if not self._draws:
            picked: list[int] = logits.argmax(-1).tolist()
            return picked
        shares = logits.float().softmax(-1).cpu()
        drawn: list[int] = torch.multinomial(shares, 1, generator=self.generator)[:, 0].tolist()
        return drawn
