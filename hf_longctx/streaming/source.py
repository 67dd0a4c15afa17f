"""The frames of a stream at an even rate, read in a thread, with a bounded queue between."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any, Literal

import torch

from .channel import Channel, Closed
from .frames import Frame
from .opening import open_source
from .pictures import Counts, Opened, Picture, Reading

_STALL_S = 10.0  # of what comes by itself
_SLOW_S = 60.0  # of what is made or decoded on demand, maybe on a busy machine
_EPS = 1e-6  # seconds: times of containers are rounded to their own clock


class FrameSource(Iterator[Frame]):
    """Frames with times `k / fps`, to be iterated once; also a context manager that closes it.

    Made by `frames`. An exception of the source is raised after the frames that came before it.

    Attributes:
        name: of the source, for messages, without a password.
        fps: frames a second.
        live: the source goes on whether anybody reads or not.
        duration: seconds, None if it has no end that is known.
        when_full: what happens when nobody takes the frames: `wait` or `drop`.
    """

    def __init__(self, opened: Opened, counts: Counts, fps: float, drop: bool, queue: int, stall_s: float) -> None:
        self.name, self.fps, self.live, self.duration = opened.name, fps, opened.live, opened.duration
        self.when_full = "drop" if drop else "wait"
        self._counts, self._stall_s = counts, stall_s
        self._channel: Channel[Frame] = Channel(queue, drop)
        self._last_t: float | None = None
        reader = threading.Thread(
            target=_read, args=(opened, fps, self._counts, self._channel), name=f"frames of {self.name}", daemon=True
        )
        self._close = weakref.finalize(self, self._channel.close)  # a source that is forgotten must not keep reading
        reader.start()

    @property
    def counts(self) -> Counts:
        """What became of the pictures so far."""
        self._counts.dropped = self._channel.dropped
        return self._counts

    def __next__(self) -> Frame:
        """The next frame.

        Raises:
            StopIteration: no more.
            TimeoutError: none came within `stall_s` seconds.
            ValueError: the source ended without a single frame.
            Exception: whatever the source raised.
        """
        self.wait()
        try:
            frame = self._channel.get()
        except StopIteration:
            if self._close.alive and self._counts.read == 0:
                self.close()
                raise ValueError(f"frames: expected at least one frame in {self.name}; got none.") from None
            raise
        except BaseException:
            self.close()
            raise
        self._counts.delivered += 1
        self._last_t = frame.t
        return frame

    def wait(self) -> None:
        """Wait until a frame, the end or an error is there; raises TimeoutError if the source stalls."""
        if not self._channel.ready(self._stall_s):
            self.close()
            since = "the beginning" if self._last_t is None else f"t = {self._last_t:g} s"
            raise TimeoutError(
                f"frames: expected a frame of {self.name} within {self._stall_s:g} s; got none since {since}. "
                "Check the source, or raise stall_s."
            )

    def begin(self) -> None:
        """Wait for the first frame; raises what `__next__` would if there is none."""
        self.wait()
        if not self._channel.waiting:
            next(self)

    def close(self) -> None:
        """Stop reading; the thread ends with the picture it is at."""
        self._close()

    def __enter__(self) -> FrameSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def frames(
    source: Any,
    fps: float = 2.0,
    *,
    when_full: Literal["wait", "drop"] | None = None,
    queue: int = 8,
    stall_s: float | None = None,
    rate: float | None = None,
    max_pixels: int | None = None,
    start_s: float = 0.0,
    stop_s: float | None = None,
    reconnect_s: float = 0.0,
) -> FrameSource:
    """Frames of a file, folder, camera, network stream or iterator, `fps` a second.

    The frame of time `k / fps` is the picture that the source shows then: the last one that came no later. A slower
    source repeats pictures, a faster one loses some. A thread reads ahead, as far as the queue goes.

    Args:
        source: a video file; a folder of images; `camera:0`; a URL (`rtsp://`, `http://`, ...); or an iterable of
            pictures (PIL, uint8 numpy or torch, see `frames.rgb`), of pairs (seconds, picture), or of `Frame`.
        fps: frames a second.
        when_full: `wait`: the source waits for the reader, nothing is lost. `drop`: the oldest frame is forgotten, and
            counted. None is `drop` for cameras and live URLs, else `wait`.
        queue: frames that wait at most.
        stall_s: seconds without a frame that are an error; None is 10 for cameras and live URLs, else 60.
        rate: pictures a second of a folder or of an iterable without times; None is `fps`.
        max_pixels: larger pictures are scaled down to this; None leaves them.
        start_s: seconds into a video file; times count from there.
        stop_s: seconds into it to stop at.
        reconnect_s: seconds that a camera or a live URL which broke off, or ended, is tried again; the clock of the
            stream stands still meanwhile. 0: it is over.

    Returns:
        An iterator, already reading. The first picture of anything but an iterable has been read.

    Raises:
        FileNotFoundError: no such file, folder or camera.
        ValueError: an argument out of range; not a video, or one without a frame.
        TypeError: not a source.
        ImportError: the extra `video` is missing.
        OSError: a device or stream that does not answer (ConnectionError, TimeoutError).
    """
    rates = {"fps": fps, "rate": fps if rate is None else rate, "stall_s": 1.0 if stall_s is None else stall_s}
    for name, value in rates.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected more than 0; got {value:g}.")
    counts = {"queue": queue, "max_pixels": 1 if max_pixels is None else max_pixels}
    for name, size in counts.items():
        if size < 1:
            raise ValueError(f"{name}: expected at least 1; got {size}.")
    if when_full not in (None, "wait", "drop"):
        raise ValueError(f"when_full: expected wait or drop; got '{when_full}'.")
    if not 0 <= start_s < (math.inf if stop_s is None else stop_s):
        raise ValueError(f"start_s, stop_s: expected 0 <= start_s < stop_s; got {start_s:g} and {stop_s}.")
    if not 0 <= reconnect_s < math.inf:
        raise ValueError(f"reconnect_s: expected 0 or more seconds; got {reconnect_s:g}.")
    tally = Counts()
    how = Reading(rates["rate"], max_pixels, stall_s or _STALL_S, start_s, stop_s, reconnect_s)
    opened = open_source(source, how, tally)
    if reconnect_s and not opened.live:
        opened.pictures.close()
        raise ValueError(f"frames: expected reconnect_s with a live source; got {opened.name}. Leave it out.")
    drop = opened.live if when_full is None else when_full == "drop"
    patience = (stall_s or (_STALL_S if opened.live else _SLOW_S)) * (2 if reconnect_s else 1) + reconnect_s
    made = FrameSource(opened, tally, fps, drop, queue, patience)
    if isinstance(source, (str, os.PathLike)):
        made.begin()
    return made


def _read(opened: Opened, fps: float, counts: Counts, channel: Channel[Frame]) -> None:
    """The thread: until the source ends, fails, or nobody wants more."""
    try:
        with suppress(Closed), closing(opened.pictures) as pictures:
            for frame in ticks(pictures, fps, counts):
                channel.put(frame)
        channel.end()
    except BaseException as error:  # it belongs to the thread that reads the frames
        channel.end(error)


def ticks(pictures: Iterator[Picture], fps: float, counts: Counts) -> Iterator[Frame]:
    """Pictures at even times.

    Args:
        pictures: in order; a clock that goes back goes on from where it was.
        fps: frames a second.
        counts: `read`, `repeated` and `resets` are added to.

    Yields:
        Frames at `k / fps`, k = 0, 1, ..., each as soon as it is certain.
    """
    k, last, offset = 0, 0.0, 0.0
    held: Picture | None = None
    image: torch.Tensor | None = None

    def show(until: float) -> Iterator[Frame]:
        nonlocal k, image
        while held is not None and k / fps < until:
            if image is None:
                image = held.pixels()
            else:
                counts.repeated += 1
            yield Frame(k / fps, image)
            k += 1

    for picture in pictures:
        counts.read += 1
        if held is None:
            offset = picture.t
        elif picture.t - offset < last - _EPS:
            offset = picture.t - last - (held.lasts or 1 / fps)
            counts.resets += 1
        at = picture.t - offset
        yield from show(until=at - _EPS)
        held, last, image = picture, at, None
        yield from show(until=at + _EPS)
    if held is not None:
        yield from show(until=last + held.lasts - _EPS)
