"""The frames of a stream, gathered into rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from .frames import Frame


@dataclass
class Round:
    """The frames of one stretch of a stream, all of one size.

    Args:
        t: where it starts, in seconds of the stream.
        t_end: and where it ends.
        times: of its frames.
        pictures: `[H, W, 3]`, uint8.
    """

    t: float
    t_end: float
    times: list[float] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)


def rounds(frames: Iterable[Frame], round_s: float, start: float) -> Iterator[Round]:
    """Frames in rounds of `round_s` seconds; one in which the size changes is cut there.

    Args:
        frames: in the order of their times.
        round_s: length of a round, which starts at a whole multiple of it.
        start: where the stream stands already; frames that begin again from zero go on from there.

    Raises:
        Exception: what the source raised, after the round that it broke off.
        TypeError: something that is no frame.
        ValueError: a frame before the one before, or a picture that is none.
    """
    open_: Round | None = None
    offset, last = None, -math.inf
    failure: BaseException | None = None
    source = iter(frames)
    while True:
        try:
            frame = next(source)
        except StopIteration:
            break
        except Exception as error:  # what came before it is a round yet
            failure = error
            break
        _check(frame, last if offset is None else last - offset)
        if offset is None:
            offset = start if frame.t < start else 0.0
        last = t = frame.t + offset
        number = math.floor(t / round_s + 1e-6)
        begins, ends = number * round_s, (number + 1) * round_s
        if open_ is not None and begins >= open_.t_end - 1e-6:
            yield open_
            open_ = None
        elif open_ is not None and open_.pictures[0].shape != frame.image.shape:
            open_.t_end = t
            yield open_
            open_, begins = None, t
        if open_ is None:
            open_ = Round(begins, ends)
        open_.times.append(t)
        open_.pictures.append(frame.image)
    if open_ is not None:
        yield open_
    if failure is not None:
        raise failure


def _check(frame: Frame, last: float) -> None:
    if not isinstance(frame, Frame):
        raise TypeError(
            f"stream.Session: expected frames; got {type(frame).__name__}. Read the source with lc.stream.frames."
        )
    if not frame.t > last:
        raise ValueError(
            f"stream.Session: expected frames in the order of their times; got {frame.t:g} s after {last:g} s. "
            "Sort them, or give each source a session of its own."
        )
    if frame.image.ndim != 3 or frame.image.shape[2] != 3 or 0 in frame.image.shape:
        raise ValueError(
            f"stream.Session: expected pictures of [H, W, 3]; got {list(frame.image.shape)} at {frame.t:g} s. "
            "Read them with lc.stream.frames."
        )
