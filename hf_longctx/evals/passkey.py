"""A number hidden in a long text: the smallest task that shows whether a method still sees all of its context."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from rich.console import Console

from . import text as texts
from .haystack import Haystack
from .runner import DEFAULTS, Exam, Options, Row, Trial, derive, run_exam
from .tables import publish
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


def build(tokenizer: Any, text: str | Haystack, length: int, depth: float = 0.5, seed: int = 0) -> Passkey:
    """A prompt of exactly `length` tokens with a random pass key at a depth of the text.

    A text that is too short is repeated. The needle goes to the end of the nearest sentence.

    Args:
        tokenizer: a transformers tokenizer.
        text: what surrounds the needle. Many trials are built faster from one `Haystack`.
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
    hay = text if isinstance(text, Haystack) else Haystack(tokenizer, text)
    body, [(first, end)] = hay.hide([(depth, needle)], room, draw.randrange(len(hay.ids)))
    ids = torch.tensor(head + body + question, dtype=torch.long)
    return Passkey(ids, key, (len(head) + first, len(head) + end))


def judge(answer: str, key: str) -> bool:
    """Right if the first number of the answer is the key, whatever follows it."""
    number = re.search(r"\d+", answer)
    return number is not None and number.group() == key


def check(name: str, trials: int, new_tokens: int) -> None:
    """Refuse what is wrong for every model.

    Raises:
        ValueError: fewer than one trial, or fewer than two new tokens, of which one has no time per token.
    """
    if trials < 1 or new_tokens < 2:
        raise ValueError(f"{name}: expected at least 1 trial and 2 new tokens; got {trials} and {new_tokens}.")


def exam(
    tokenizer: Any,
    name: str,
    lengths: Sequence[int],
    depths: Sequence[float] | None,
    trials: int,
    text: str | os.PathLike[str] | None,
    new_tokens: int,
    seed: int,
) -> Exam:
    """Pass keys of several lengths.

    Args:
        tokenizer: a transformers tokenizer.
        name: of the evaluation.
        lengths: tokens in a prompt.
        depths: `trials` prompts at each of them; None gives every prompt a depth of its own.
        trials: prompts for each length, or for each length and depth.
        text: a UTF-8 file; None is the text that ships with the package.
        new_tokens: to generate at most.
        seed: draws everything; a trial does not depend on which others there are.

    Raises:
        ValueError: as `check`.
    """
    check(name, trials, new_tokens)
    content = texts.read(text)

    def prompts() -> Iterator[Trial]:
        hay = Haystack(tokenizer, content)
        wishes: Sequence[float | None] = depths or [None]
        for length, wish, trial in product(lengths, wishes, range(trials)):
            drawn = derive(seed, name, length, wish, trial)
            depth = round(random.Random(f"depth of {drawn}").random(), 4) if wish is None else wish
            made = build(tokenizer, hay, length, depth, drawn)
            yield Trial("passkey", length, depth, trial, drawn, made.ids, (made.key,), new_tokens)

    settings = {"new_tokens": new_tokens, **texts.about(text, content)}
    return Exam(name, prompts(), lambda answer, expected: float(judge(answer, *expected)), settings)


def run(
    model: Any,
    tokenizer: Any,
    methods: str,
    lengths: Sequence[int],
    trials: int = 10,
    *,
    text: str | os.PathLike[str] | None = None,
    new_tokens: int = 12,
    options: Options = DEFAULTS,
    console: Console | None = None,
) -> list[Row]:
    """How often each method finds a pass key at a random depth.

    Args:
        model: an unpatched causal language model.
        tokenizer: its tokenizer.
        methods: e.g. `dense,streaming_llm(sinks=4,window=508)`.
        lengths: tokens in a prompt.
        trials: prompts for each length, the same for every method.
        text: a UTF-8 file around the needle; None is the text that ships with the package.
        new_tokens: to generate at most.
        options: how to run, and where files go: `passkey.jsonl`, `passkey_summary.json`, `run_meta.json`.
        console: where bar and table go; None shows nothing.

    Returns:
        A row for each method and trial.

    Raises:
        ValueError: an argument that does not fit; nothing ran.
        UnsupportedError: the model cannot do one of the methods; nothing ran.
    """
    asked = exam(tokenizer, "passkey", lengths, None, trials, text, new_tokens, options.seed)
    rows = run_exam(model, tokenizer, methods, asked, options, console)
    publish(rows, "Pass keys found", options.out and options.out / "passkey_summary.json", console)
    return rows
