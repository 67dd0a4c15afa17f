"""Needles in a haystack: some named numbers in the text, of which some are asked for."""

from __future__ import annotations

from random import Random

from .source import Prompt, Source, Task, assemble

_ONE = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "number afterwards.\n",
    "\nWhat is the special magic number for {query} mentioned in the provided text? The special magic number for "
    "{query} mentioned in the provided text is",
)
_MANY = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n",
    "\nWhat are all the special magic numbers for {query} mentioned in the provided text? The special magic numbers "
    "for {query} mentioned in the provided text are",
)


def retrieval(keys: int, values: int, queries: int) -> Task:
    """Needles in the text: `values` numbers for each of `keys` names, of which `queries` are asked for."""

    def build(task: str, source: Source, length: int, seed: int) -> Prompt:
        draw = Random(seed)
        source.need(task, 2 * keys)
        drawn = draw.sample(source.words, 2 * keys)
        names = [f"{a}-{b}" for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
        pairs = list(zip(sorted(names * values, key=names.index), _numbers(source, keys * values, draw), strict=True))
        asked = names[:queries]
        query = ", ".join(asked[:-1]) + ", and " * (queries > 1) + asked[-1]
        expected = tuple(number for name, number in pairs if name in asked)
        head, tail = (source.ids(part.format(query=query)) for part in (_ONE if len(expected) == 1 else _MANY))
        needles = [
            (draw.random(), source.ids(f" One of the special magic numbers for {name} is: {number}."))
            for name, number in pairs
        ]
        start = draw.randrange(len(source.hay.ids))
        ids, spans = assemble(task, source.hay, start, length, needles, source.opening + head, tail)
        return Prompt(ids, expected, spans[: len(expected)])

    return Task(build, 128)


def _numbers(source: Source, count: int, draw: Random) -> list[str]:
    """Different numbers of seven digits that the text does not have."""
    found: list[str] = []
    while len(found) < count:
        number = str(draw.randint(1_000_000, 9_999_999))
        if number not in source.text and number not in found:
            found.append(number)
    return found
