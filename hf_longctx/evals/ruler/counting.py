"""Counting: the most common words of a numbered list, and the most frequent words of a coded text."""

from __future__ import annotations

import string
from bisect import bisect_right
from collections.abc import Callable
from itertools import islice
from math import isqrt
from random import Random

import torch

from .source import Prompt, Source, Task, space

_COMMON = 10
_CODED = 3
_ZETA = 1.6449  # sum of 1 / k^2
_LIST = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
_LISTED = (
    "\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often "
    "in the list are:"
)
_CODE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words.\n"
)
_DECODED = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:"
)


def _common_words(task: str, source: Source, length: int, seed: int) -> Prompt:
    """A numbered list in which ten words come up to 30 times, and all others a tenth of that, after a solved one."""
    source.need(task, 200)
    draw = Random(seed)
    pool = draw.sample(source.words, len(source.words))
    alone = (word for word in pool if not any(word in other for other in pool if other != word))
    common, shown = list(islice(alone, _COMMON)), list(islice(alone, _COMMON))
    rare = [word for word in pool if word not in {*common, *shown}]
    example = _list(shown, rare, 4 * _COMMON, draw.random())
    solved = f"{_LIST}{example}{_LISTED}{_numbered(shown)}\n\n\n{_LIST}"
    head, tail = source.opening + source.ids(solved), source.ids(_LISTED)
    room, order = space(task, length, head, tail), draw.random()
    whole = len(source.ids(_list(common, rare, 30 * _COMMON + 3 * len(rare), order)))
    if whole < room:
        source.need(task, len(pool) * room // whole + 1)
    entries, body = _fill(source, room, lambda entries: _list(common, rare, entries, order))
    _enough(task, entries, 4 * _COMMON, length)
    return Prompt(torch.tensor(head + body + tail), tuple(common))


def _mix(entries: int) -> tuple[int, int, int]:
    """Of a list: how often a common word comes, how often another, and how many others there are."""
    times = min(30, entries // (2 * _COMMON))
    seldom = max(1, times // 10)
    return times, seldom, (entries - times * _COMMON) // seldom


def _list(common: list[str], rare: list[str], entries: int, order: float) -> str:
    """At most so many numbered words, shuffled."""
    times, seldom, others = _mix(entries)
    words = common * times + rare[:others] * seldom
    Random(order).shuffle(words)
    return _numbered(words)


def _numbered(words: list[str]) -> str:
    return "".join(f" {number}. {word}" for number, word in enumerate(words, start=1))


def _frequent_words(task: str, source: Source, length: int, seed: int) -> Prompt:
    """Made-up words, of which the k-th comes 1/k^2 as often as the first, which is only dots; the next three are asked.

    The paper draws the counts from this distribution; here they are its expectation, so that the answer is never a tie.
    """
    draw = Random(seed)
    head, tail = source.opening + source.ids(_CODE), source.ids(_DECODED)
    room = space(task, length, head, tail)
    coded = ["".join(draw.choices(string.ascii_lowercase, k=6)) for _ in range(2 * isqrt(room) + 9)]
    ranked = ["....", *dict.fromkeys(coded)]
    order = draw.random()

    def text(words: int) -> str:
        said = [word for k, word in enumerate(ranked, start=1) for _ in range(int(words / (_ZETA * k * k)))]
        Random(order).shuffle(said)
        return " ".join(said)

    words, body = _fill(source, room, text)
    _enough(task, words, 100, length)  # below, the fourth word comes no more often than the fifth
    return Prompt(torch.tensor(head + body + tail), tuple(ranked[1 : 1 + _CODED]))


def _fill(source: Source, room: int, text: Callable[[int], str]) -> tuple[int, list[int]]:
    """The most words that fit, and the ids of their text, filled up with line ends to `room` tokens."""
    words = bisect_right(range(room), room, key=lambda words: len(source.ids(text(words)))) - 1
    ids = source.ids(text(words))
    return words, ids + [source.filler] * (room - len(ids))


def _enough(task: str, words: int, least: int, length: int) -> None:
    """Refuse a prompt too short to count in.

    Raises:
        ValueError: it holds fewer than `least` words.
    """
    if words < least:
        raise ValueError(f"{task}: expected a prompt that holds {least} words; got {words} in {length} tokens.")


COMMON_WORDS = Task(_common_words, 120)
FREQUENT_WORDS = Task(_frequent_words, 50)
