"""Runs of tokens that stay or go as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Span:
    """A turn with its pictures, or a piece of text.

    Args:
        kind: what it is made of; a turn with pictures is `vision`, the words around them included.
        tokens: how many, those to come included.
        number: how many of its kind, pinned ones aside, were there before in its row.
        t: its end, in seconds of the stream.
        pinned: it never goes.
    """

    kind: Literal["text", "vision"]
    tokens: int
    number: int
    t: float
    pinned: bool = False
