"""Books with pass keys in them, and the answers that a model can only write if it still sees them.

Paper: DuoAttention (arXiv:2410.10819) §2.2.
Differs: a book begins anywhere in the text, in place of always at its start; keys and questions count in a lesson's
length, which is one of 8, in place of 50, as a GPU prepares itself for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..evals.haystack import Haystack
from ..evals.runner import derive
from ..evals.text import opening_ids, token_ids
from .pattern import message

MODES = ("paper", "code")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_WORDS = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india",
    "juliett", "kilo", "lima", "mike", "november", "oscar", "papa", "quebec", "romeo",
    "sierra", "tango", "uniform", "victor", "whiskey", "xray", "yankee", "zulu",
)  # fmt: skip
_HEAD = "This is a very long story book: <book>\n"
_NEEDLE = "\n\nRemember this sequence of words, it is the {ordinal} pass key to the vault:"
_TAIL = "\n</book>\n\n"
_QUESTION = "By the book, what is the {ordinal} pass key to the vault?\nPass key:"
_END = "\n\n"
_DEPTHS = 1000


@dataclass(frozen=True)
class Task:
    """What lessons are made of.

    Attributes:
        mode: where hidden states are compared. paper: in the pass keys of the answers; code: everywhere after the book.
        shortest: tokens of a lesson, book, keys and questions together.
        longest: likewise.
        sizes: different lengths, evenly spaced between the two.
        keys: pass keys in a book, at random depths.
        words: of a pass key.
        seed: draws everything; lesson i does not depend on which others there are.
    """

    mode: str = "paper"
    shortest: int = 3000
    longest: int = 32000
    sizes: int = 8
    keys: int = len(_ORDINALS)
    words: int = 32
    seed: int = 42

    def __post_init__(self) -> None:
        for name, holds, wanted in (
            ("mode", self.mode in MODES, f"among {', '.join(MODES)}"),
            ("keys", 1 <= self.keys <= len(_ORDINALS), f"from 1 to {len(_ORDINALS)}"),
            ("words", self.words >= 1, "of at least 1"),
            ("sizes", self.sizes >= 1, "of at least 1"),
            ("shortest", self.shortest >= 1, "of at least 1"),
            ("longest", self.longest >= self.shortest, f"of at least the shortest, {self.shortest}"),
        ):
            if not holds:
                raise ValueError(message("heads train", f"{name} {wanted}", repr(getattr(self, name)), "Change it"))

    @property
    def lengths(self) -> list[int]:
        """Those that lessons have."""
        steps, range_ = max(1, self.sizes - 1), self.longest - self.shortest
        return sorted({self.longest - round(range_ * n / steps) for n in range(self.sizes)})


@dataclass(frozen=True)
class Lesson:
    """One text.

    Attributes:
        ids: `[T]`, int64.
        shares: `[T]`, float32, of each token in the mean over those in which hidden states are compared; else 0.
    """

    ids: Tensor
    shares: Tensor

    @staticmethod
    def of(ids: Tensor, marks: Tensor) -> Lesson:
        """A text, compared in the tokens at some places, `[n]`, int64."""
        return Lesson(ids, torch.zeros(len(ids)).index_fill(0, marks, 1 / len(marks)))

    @property
    def marks(self) -> Tensor:
        """`[n]`, int64, the tokens that are compared, ascending."""
        return self.shares.nonzero()[:, 0]


class Lessons:
    """As many lessons as are asked for.

    Args:
        tokenizer: a transformers tokenizer.
        text: the books are cut from it; where it is too short, it is repeated.
        task: what they are made of.

    Raises:
        ValueError: the shortest lesson has no room for a book.
    """

    def __init__(self, tokenizer: Any, text: str, task: Task) -> None:
        self.task, self._tokenizer = task, tokenizer
        word = max(_WORDS, key=lambda each: len(self._ids(f" {each}")))
        most = self._beside(*self._say([[word] * task.words] * task.keys)[:2])
        if task.shortest <= most:
            advice = "Ask for longer ones, or for fewer keys or words"
            raise ValueError(message("heads train", f"lessons of more than {most} tokens", f"{task.shortest}", advice))
        self._hay = Haystack(tokenizer, text)

    def __getitem__(self, index: int) -> Lesson:
        """Lesson `index`, always the same."""
        task, draw = self.task, Random(derive(self.task.seed, "lesson", index))
        depths = sorted(0.05 + 0.9 * place / (_DEPTHS - 1) for place in draw.sample(range(_DEPTHS), task.keys))
        needles, tail, answers = self._say([draw.choices(_WORDS, k=task.words) for _ in range(task.keys)])
        room = draw.choice(task.lengths) - self._beside(needles, tail)
        book, _ = self._hay.hide(list(zip(depths, needles, strict=True)), room, draw.randrange(len(self._hay.ids)))
        ids = self._head + book
        marks = [i + len(ids) for i in (answers if task.mode == "paper" else range(len(tail)))]
        return Lesson.of(torch.tensor(ids + tail), torch.tensor(marks))

    def _say(self, keys: Sequence[Sequence[str]]) -> tuple[list[list[int]], list[int], list[int]]:
        """Sentences that hide the keys, questions with answers, and which tokens of these are keys."""
        needles, tail = [], self._ids(_TAIL)
        answers: list[int] = []
        for ordinal, words in zip(_ORDINALS, keys, strict=False):
            key = self._ids(" " + " ".join(words))  # by itself, so that its tokens are the same in both places
            needles.append(self._ids(_NEEDLE.format(ordinal=ordinal)) + key + self._ids(_END))
            tail += self._ids(_QUESTION.format(ordinal=ordinal))
            answers += range(len(tail), len(tail) + len(key))
            tail += key + self._ids(_END)
        return needles, tail, answers

    def _beside(self, needles: Sequence[Sequence[int]], tail: Sequence[int]) -> int:
        """Tokens of a lesson beside its book."""
        return len(self._head) + sum(map(len, needles)) + len(tail)

    @cached_property
    def _head(self) -> list[int]:
        return opening_ids(self._tokenizer) + self._ids(_HEAD)

    def _ids(self, text: str) -> list[int]:
        return token_ids(self._tokenizer, text)
