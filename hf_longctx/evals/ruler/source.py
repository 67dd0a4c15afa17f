"""What RULER prompts are made of: a text, its words, and needles put into it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..haystack import Haystack
from ..text import opening_ids, token_ids

_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


class Source:
    """What all prompts of a run are made from.

    Args:
        tokenizer: a transformers tokenizer.
        text: the haystack, and the words.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.text = text
        self.hay, self.noise = Haystack(tokenizer, text), Haystack(tokenizer, _NOISE)
        self.words = sorted(set(re.findall(r"(?<![\w'-])[a-z]{4,}(?![\w'-])", text)))
        self.opening = opening_ids(tokenizer)
        self.ids = partial(token_ids, tokenizer)
        self.filler = self.ids("\n")[-1]

    def need(self, task: str, words: int) -> None:
        """Refuse a text with too few words.

        Raises:
            ValueError: it has fewer than `words` different ones.
        """
        if len(self.words) < words:
            raise ValueError(
                f"{task}: expected a text with at least {words:,} different words of four letters or more; got "
                f"{len(self.words):,}. Pass a longer text or a smaller length."
            )


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        ids: `[T]`, int64, exactly as long as it was asked for.
        expected: strings that a right answer holds.
        facts: first and one-past-last token of everything that was hidden for the answer, in the order of `expected`;
            empty where the answer is in the counts.
    """

    ids: torch.Tensor
    expected: tuple[str, ...]
    facts: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Task:
    """One family.

    Attributes:
        build: a prompt from (task name, source, length, seed).
        new_tokens: to generate, as in the paper's settings.
    """

    build: Callable[[str, Source, int, int], Prompt]
    new_tokens: int


def assemble(
    task: str,
    hay: Haystack,
    start: int,
    length: int,
    needles: list[tuple[float, list[int]]],
    head: list[int],
    tail: list[int],
) -> tuple[torch.Tensor, tuple[tuple[int, int], ...]]:
    """Head, text with needles, and tail, `length` together; and where the needles are."""
    room = space(task, length, head, tail, *(ids for _, ids in needles))
    body, spans = hay.hide(needles, room, start)
    return torch.tensor(head + body + tail), tuple((len(head) + first, len(head) + end) for first, end in spans)


def space(task: str, length: int, *parts: list[int]) -> int:
    """Tokens that are left.

    Raises:
        ValueError: there are none.
    """
    room = length - sum(map(len, parts))
    if room < 1:
        raise ValueError(f"{task}: expected at least {length - room + 1} tokens for the prompt; got {length}.")
    return room
