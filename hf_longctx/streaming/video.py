"""Videos, cameras and network streams through PyAV (FFmpeg)."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .frames import fit
from .pictures import Counts, Opened, Picture, Reading

_EPS = 1e-6  # seconds: containers round to their own clock
_DAMAGED_IN_A_ROW = 100  # packets; a lossy network loses a few, a wrong decoder all


def open_camera(name: str, how: Reading, counts: Counts) -> Opened:
    """`camera:0` by the operating system's own interface; what follows the colon may also be the device's name."""
    which = name.removeprefix("camera:")
    if sys.platform == "darwin":
        return open_video(which, name, True, how, counts, {"format": "avfoundation", "options": {"framerate": "30"}})
    if sys.platform == "win32":
        return open_video(f"video={which}", name, True, how, counts, {"format": "dshow"})
    device = Path(f"/dev/video{which}" if which.isdigit() else which)
    if not device.exists():
        there = sorted(str(path) for path in Path("/dev").glob("video*"))
        raise FileNotFoundError(
            f"frames: expected a camera at {device} for {name}; got no such device. "
            f"There is: {', '.join(there) or 'none'}."
        )
    return open_video(str(device), name, True, how, counts, {"format": "v4l2"})


def open_video(
    where: str, name: str, live: bool, how: Reading, counts: Counts, options: dict[str, Any] | None = None
) -> Opened:
    """A container with a video stream in it."""
    if find_spec("av") is None:
        raise ImportError(f"frames: reading {name} needs PyAV. pip install 'hf_longctx[video]'")
    import av

    with _told(name, how.timeout):
        container = av.open(where, timeout=how.timeout, **(options or {}))
    if not container.streams.video:
        container.close()
        raise ValueError(f"frames: expected a video in {name}; got no video stream. Name another file.")
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    length = None if live or container.duration is None else container.duration / av.time_base
    if length is not None:
        if how.start >= length:
            container.close()
            raise ValueError(f"frames: expected start_s below the {length:g} s of {name}; got {how.start:g}.")
        length = min(length, how.stop or length) - how.start
    origin = 0.0 if live else float((stream.start_time or 0) * stream.time_base)
    return Opened(name, live, length, _decoded(container, name, origin, how, counts))


def _decoded(container: Any, name: str, origin: float, how: Reading, counts: Counts) -> Generator[Picture, None, None]:
    """Pictures of a container that starts at `origin` seconds; it is closed when they end, however they end."""
    with container, _told(name, how.timeout):
        stream = container.streams.video[0]
        if how.start:
            container.seek(int((how.start + origin) / stream.time_base), stream=stream)
        lasts = 1 / float(stream.average_rate) if stream.average_rate else 0.0
        begun, before = False, None  # winding ends at a key frame some pictures too early
        for t, frame in _timed(container, stream, origin - lasts, lasts, counts):
            at = t - origin - how.start
            if how.stop is not None and at >= how.stop - how.start:
                break
            picture = Picture(max(at, 0.0), lasts, partial(_pixels, frame, how.max_pixels))
            if at < -_EPS:
                before = picture
                continue
            if before is not None and not begun and at > _EPS:
                yield before
            yield picture
            begun = True
        if before is not None and not begun:
            yield before


def _timed(container: Any, stream: Any, t: float, lasts: float, counts: Counts) -> Iterator[tuple[float, Any]]:
    """Decoded frames with their seconds; one without a time follows the one before, the first after `t`."""
    import av

    in_a_row = 0
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            counts.damaged, in_a_row = counts.damaged + 1, in_a_row + 1
            if in_a_row == _DAMAGED_IN_A_ROW:
                raise
            continue
        in_a_row = 0
        for frame in frames:
            t = t + lasts if frame.time is None else frame.time
            yield t, frame


def _pixels(frame: Any, max_pixels: int | None) -> torch.Tensor:
    """`[H, W, 3]` of a decoded frame, scaled and turned upright."""
    height, width = fit(frame.height, frame.width, max_pixels)
    array = frame.to_ndarray(format="rgb24", width=width, height=height)
    return torch.from_numpy(np.ascontiguousarray(np.rot90(array, round(frame.rotation / 90))))


@contextmanager
def _told(name: str, timeout: float) -> Iterator[None]:
    """FFmpeg's errors as Python's own, with the name of the source and what to do."""
    import av

    try:
        yield
    except (av.error.InvalidDataError, av.error.EOFError) as error:
        raise ValueError(
            f"frames: expected a video in {name}; got data that FFmpeg cannot read. Is it whole?"
        ) from error
    except (av.error.ExitError, av.error.TimeoutError) as error:
        raise TimeoutError(
            f"frames: expected {name} to answer within {timeout:g} s; got nothing. Check it, or raise stall_s."
        ) from error
    except av.error.FFmpegError as error:
        said = getattr(error, "strerror", None) or error
        raise ConnectionError(f"frames: expected to read {name}; got: {said}. Check the address.") from error
