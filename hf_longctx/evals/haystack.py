"""A text as tokens that goes on for ever, and sentences hidden in it at given depths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .text import token_ids


class Haystack:
    """The tokens of a text, and those of them that end a sentence. Made once, cut many times.

    Args:
        tokenizer: a transformers tokenizer.
        text: where it is too short for a prompt, it is repeated.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.ids = token_ids(tokenizer, text)
        self._stops = {i for i in set(self.ids) if tokenizer.decode([i]).rstrip().endswith((".", "!", "?"))}

    def hide(
        self, needles: Sequence[tuple[float, list[int]]], room: int, start: int
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """`room` tokens of the text with needles in between, each at the end of the sentence nearest to its depth.

        Args:
            needles: (depth from 0 to 1, token ids); of two at one place, the one of the lower depth comes first.
            room: tokens of the text, needles not counted.
            start: token of the text to begin with.

        Returns:
            The ids, `room` and all needles long, and for each needle, as given, its first and one-past-last index.
        """
        hay = [self.ids[(start + i) % len(self.ids)] for i in range(room)]
        ends = [i + 1 for i, token in enumerate(hay) if token in self._stops]
        ids: list[int] = []
        spans = [(0, 0)] * len(needles)
        done = 0
        for which in sorted(range(len(needles)), key=lambda which: needles[which][0]):
            depth, needle = needles[which]
            cut = _nearest(ends, room, round(depth * room))
            ids += hay[done:cut]
            spans[which] = (len(ids), len(ids) + len(needle))
            ids += needle
            done = cut
        return ids + hay[done:], spans


def _nearest(ends: list[int], room: int, wish: int) -> int:
    """The sentence end nearest to `wish`, the two ends of the text included; `wish` in a text without sentences."""
    return min([0, room, *ends], key=lambda cut: abs(cut - wish)) if ends else wish
