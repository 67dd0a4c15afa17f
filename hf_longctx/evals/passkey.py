"""A number hidden in a long text: the smallest task that shows whether a method still sees all of its context."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

import torch

from .text import opening_ids, token_ids

INSTRUCTION = "There is important information hidden inside a lot of irrelevant text. Find it and memorize it.\n\n"
NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Passkey:
    """One trial.

    Attributes:
        ids: `[T]`, int64: the whole prompt, exactly as long as it was asked for.
        key: the five digits.
        needle: first and one-past-last token of the needle in `ids`.
    """

    ids: torch.Tensor
    key: str
    needle: tuple[int, int]

    @property
    def distance(self) -> int:
        """Tokens from the end of the needle to the end of the prompt: a window below it cannot see the needle."""
        return len(self.ids) - self.needle[1]


def build(tokenizer: Any, text: str, length: int, depth: float = 0.5, seed: int = 0) -> Passkey:
    """A prompt of exactly `length` tokens with a random pass key at a depth of the text.

    A text that is too short is repeated. The needle goes to the end of the nearest sentence.

    Args:
        tokenizer: a transformers tokenizer.
        text: what surrounds the needle.
        length: tokens in the prompt.
        depth: 0 is right after the instruction, 1 right before the question.
        seed: draws the key and where in the text to begin.

    Returns:
        The trial.

    Raises:
        ValueError: a depth outside 0..1, or a length that leaves no room for the text.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"passkey: expected a depth from 0 to 1; got {depth}. 0.5 is the middle.")
    draw = random.Random(seed)
    key = str(draw.randint(10_000, 99_999))
    head = opening_ids(tokenizer) + token_ids(tokenizer, INSTRUCTION)
    needle, question = (token_ids(tokenizer, part.format(key=key)) for part in (NEEDLE, QUESTION))
    room = length - len(head) - len(needle) - len(question)
    if room < 1:
        raise ValueError(
            f"passkey: expected a length of at least {length - room + 1} tokens, so that some text fits around the "
            f"needle; got {length}."
        )
    hay = token_ids(tokenizer, text)
    start = draw.randrange(len(hay))
    hay = [hay[(start + i) % len(hay)] for i in range(room)]
    at = _sentence_end(tokenizer, hay, round(depth * room))
    ids = head + hay[:at] + needle + hay[at:] + question
    first = len(head) + at
    return Passkey(torch.tensor(ids, dtype=torch.long), key, (first, first + len(needle)))


def _sentence_end(tokenizer: Any, ids: list[int], wish: int) -> int:
    """The cut nearest to `wish` that follows a full stop, or `wish` where there is none."""
    ends = [i + 1 for i, token in enumerate(ids) if tokenizer.decode([token]).rstrip().endswith((".", "!", "?"))]
    return min([0, len(ids), *ends], key=lambda cut: abs(cut - wish)) if ends else wish


def judge(answer: str, key: str) -> bool:
    """Right if the first number of the answer is the key, whatever follows it."""
    number = re.search(r"\d+", answer)
    return number is not None and number.group() == key
