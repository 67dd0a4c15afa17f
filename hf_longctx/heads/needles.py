"""Sentences hidden in a book, the questions that they answer, and where in the prompt the answers stand."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..evals.haystack import Haystack
from ..evals.text import digest, opening_ids, token_ids
from .pattern import message

_CHAT = "{context}\n\nBased on the text above: {question}"
_PLAIN = "{context}\n\nBased on the text above, Question: {question}\nAnswer:"
_TRIES = 4


@dataclass(frozen=True)
class Needle:
    """A sentence that nobody would guess, with its question.

    Args:
        needle: the sentence.
        question: about it.
        answer: the part of the sentence that is to be copied.
        start: how the answer is begun for the model; may be empty.
    """

    needle: str
    question: str
    answer: str
    start: str = ""


@dataclass(frozen=True)
class Hidden:
    """A needle in its haystack.

    Attributes:
        ids: `[T]`, int64, the prompt.
        span: first and one-past-last token of the answer in it.
        needle: what is hidden.
    """

    ids: Tensor
    span: tuple[int, int]
    needle: Needle

    @property
    def answer_ids(self) -> list[int]:
        """The tokens of the answer, as the prompt has them."""
        listed: list[int] = self.ids[self.span[0] : self.span[1]].tolist()
        return listed


def load_needles(path: str | os.PathLike[str] | None = None) -> list[Needle]:
    """Read needles from a JSONL file, a line each: `needle`, `question`, `real_needle`, and `start` where one likes.

    Args:
        path: of the file; None takes those that ship with the package.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is no needle, or whose `real_needle` is not a part of its `needle`; names the line.
    """
    source = files(__package__).joinpath("needles.jsonl") if path is None else Path(path)
    if not source.is_file():
        raise FileNotFoundError(message("needles", "a JSONL file", f"{source}, which is none", "Check the path"))
    found = []
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            found.append(_needle(line, f"{source.name}, line {number}"))
    if not found:
        raise ValueError(message(source.name, "at least one needle", "an empty file", "Write a line for each"))
    return found


def about(path: str | os.PathLike[str] | None, needles: list[Needle]) -> dict[str, str]:
    """Name and content of a file of needles, for a result file: no path of any machine."""
    return {"needles": Path(path).name if path else "shipped", "needles_sha256": digest(repr(needles))}


def _needle(line: str, where: str) -> Needle:
    advice = 'Write {"needle": ..., "question": ..., "real_needle": a part of the needle}'
    try:
        raw = json.loads(line)
        read = Needle(raw["needle"], raw["question"], raw["real_needle"].strip().rstrip("."), raw.get("start", ""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(message(where, "a needle", repr(error), advice)) from error
    if not read.answer or read.needle.count(read.answer) != 1:
        raise ValueError(message(where, "real_needle once in needle", repr(read.answer), advice))
    return read


def hide(
    tokenizer: Any,
    hay: Haystack,
    needle: Needle,
    length: int,
    depth: float,
    chat: bool,
    seed: int,
    where: str = "needle",
) -> Hidden:
    """A prompt of at most `length` tokens with the needle at a depth of the book, and where its answer stands.

    The book is cut in tokens, and the whole prompt is then tokenized as text, so that a needle is cut where the
    tokenizer cuts it; of the few tokens that this moves, the book gives way.

    Args:
        tokenizer: a fast tokenizer, which knows where in the text each token comes from.
        hay: the book.
        needle: what is hidden.
        length: tokens.
        depth: 0 is the start of the book, 1 its end.
        chat: through the tokenizer's chat template.
        seed: draws where the book begins.
        where: for messages.

    Raises:
        ValueError: a tokenizer that knows no places, a length without room for a book, or a needle that is not to be
            found in the tokenized prompt, or more than once.
    """
    if not getattr(tokenizer, "is_fast", False):
        advice = "Load it with use_fast=True"
        raise ValueError(message("tokenizer", "a fast one, with offsets", type(tokenizer).__name__, advice))
    hidden = token_ids(tokenizer, f" {needle.needle}")
    first = Random(seed).randrange(len(hay.ids))
    room = length - len(prompt_ids(tokenizer, render(tokenizer, f" {needle.needle}", needle, chat), chat)[0])
    for _ in range(_TRIES):
        if room < 1:
            break
        body, _ = hay.hide([(depth, hidden)], room, first)
        text = render(tokenizer, tokenizer.decode(body), needle, chat)
        ids, offsets = prompt_ids(tokenizer, text, chat)
        if len(ids) <= length:
            return Hidden(torch.tensor(ids), _span(text, offsets, needle, where), needle)
        room -= len(ids) - length
    raise ValueError(message(where, "a length with room for some text", f"{length} tokens", "Ask for longer prompts"))


def render(tokenizer: Any, context: str, needle: Needle, chat: bool) -> str:
    """The prompt as text."""
    if not chat:
        plain = _PLAIN.format(context=context, question=needle.question)
        return f"{plain} {needle.start}" if needle.start else plain
    said = [{"role": "user", "content": _CHAT.format(context=context, question=needle.question)}]
    text: str = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return text + needle.start


def prompt_ids(tokenizer: Any, text: str, chat: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and which characters each comes from; a template itself writes what opens a sequence."""
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    opening = [] if chat else opening_ids(tokenizer)
    return opening + read["input_ids"], [(0, 0)] * len(opening) + read["offset_mapping"]


def _span(text: str, offsets: list[tuple[int, int]], needle: Needle, where: str) -> tuple[int, int]:
    """The tokens that hold a character of the answer, where the needle is."""
    sought = re.escape(needle.needle).replace(r"\ ", r"\s+")
    found = list(re.finditer(sought, text))
    if len(found) == 1:
        inner = re.search(re.escape(needle.answer).replace(r"\ ", r"\s+"), found[0].group())
        if inner is not None:
            low, high = (found[0].start() + end for end in inner.span())
            held = [i for i, (first, last) in enumerate(offsets) if first < high and last > low]
            if held:
                return held[0], held[-1] + 1
    advice = "The tokenizer or its chat template changes this text, or the book has it too: take another needle"
    raise ValueError(message(where, f"{needle.needle!r} once in the tokenized prompt", f"{len(found)}", advice))
