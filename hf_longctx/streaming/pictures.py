"""Pictures with their times, before anything is resampled."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Picture:
    """One picture of a source, not converted until it is needed: of 30 a second a stream takes 2.

    Attributes:
        t: seconds, on the clock of the source.
        lasts: seconds until the next one is due, 0 if nobody knows.
        pixels: makes `[H, W, 3]`, uint8.
    """

    t: float
    lasts: float
    pixels: Callable[[], torch.Tensor]


@dataclass
class Opened:
    """A source that could be opened.

    Attributes:
        name: for messages.
        live: it goes on whether anybody reads or not.
        duration: seconds, None if it has no end that is known.
        pictures: in order.
    """

    name: str
    live: bool
    duration: float | None
    pictures: Generator[Picture, None, None]


@dataclass(frozen=True)
class Reading:
    """How to read a source.

    Attributes:
        rate: pictures a second of a folder or of an iterator without times.
        max_pixels: of each picture; None leaves them as they are.
        timeout: seconds that a camera or a network stream may be silent.
        start: seconds into a video file to begin at.
        stop: seconds into it to end at; None is its end.
        reconnect: seconds that a live source which broke off is tried again.
    """

    rate: float
    max_pixels: int | None
    timeout: float
    start: float = 0.0
    stop: float | None = None
    reconnect: float = 0.0


@dataclass
class Counts:
    """What became of the pictures so far.

    Attributes:
        read: pictures that the source gave.
        repeated: frames that show the same picture as the one before, where the source is slower than asked for.
        delivered: frames that were handed out.
        dropped: frames forgotten because nobody took them in time (`when_full="drop"`).
        damaged: packets that could not be decoded.
        resets: times that the source's clock went back; the stream's own goes on.
        reconnects: times that a live source broke off and was opened again.
    """

    read: int = 0
    repeated: int = 0
    delivered: int = 0
    dropped: int = 0
    damaged: int = 0
    resets: int = 0
    reconnects: int = 0
