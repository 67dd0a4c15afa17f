"""Opens whatever a stream can come from: files, folders, cameras, URLs and iterators."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .frames import Frame, rgb
from .pictures import Counts, Opened, Picture, Reading
from .video import open_camera, open_video

_LIVE = ("rtsp", "rtsps", "rtmp", "rtmps", "srt", "udp", "rtp", "tcp", "mms")
_PAUSE_S = 1.0  # between two attempts to open what broke off
_ENDING = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def open_source(source: Any, how: Reading, counts: Counts) -> Opened:
    """Open a path, a folder, `camera:N`, a URL or an iterable; damaged packets will be added to `counts`.

    Raises:
        FileNotFoundError: no such file, folder or camera.
        ValueError: not a video, no pictures in it, or an argument that does not fit.
        TypeError: none of these.
        ImportError: PyAV is needed and missing.
        OSError: a device or stream that does not answer.
    """
    if not isinstance(source, (str, os.PathLike)):
        if not isinstance(source, Iterable):
            raise TypeError(
                f"frames: expected a path, a folder, camera:N, a URL or an iterable of pictures; got "
                f"{type(source).__name__}. Pass one of these."
            )
        _whole("an iterable", how)
        return Opened("the iterator", False, None, _iterated(source, how))
    name = os.fspath(source)
    scheme = name.split("://")[0].lower() if "://" in name else None
    if scheme is None and not name.startswith("camera:"):
        path = Path(name).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"frames: expected a video file or a folder of images; got {name}, which is none.")
        return _folder(path, how) if path.is_dir() else open_video(str(path), name, False, how, counts)
    _whole("a camera or a stream", how)
    if scheme is None:
        return _lasting(partial(open_camera, name, how, counts), how, counts)
    options = {"rtsp_transport": "tcp"} if scheme in ("rtsp", "rtsps") else {}
    shown, live = re.sub(r"//[^/@]*@", "//", name), scheme in _LIVE
    return _lasting(partial(open_video, name, shown, live, how, counts, {"options": options}), how, counts)


def _lasting(again: Callable[[], Opened], how: Reading, counts: Counts) -> Opened:
    """A source that, if it is live, is opened again when it breaks off or ends."""
    opened = again()
    if not opened.live or not how.reconnect:
        return opened
    return replace(opened, pictures=_opened_again(opened, again, how.reconnect, counts))


def _opened_again(
    first: Opened, again: Callable[[], Opened], seconds: float, counts: Counts
) -> Generator[Picture, None, None]:
    """Pictures of a live source, which is tried so long after each time that it broke off."""
    now: Opened | None = first
    lost: Exception | None = None
    until = math.inf
    while True:
        try:
            if now is None:
                now = again()
                counts.reconnects += 1
            with closing(now.pictures) as pictures:
                for picture in pictures:
                    until = math.inf
                    yield picture
        except (OSError, ValueError) as error:  # a device that is gone, a server that does not answer, or with nonsense
            lost = error
        now, until = None, min(until, time.monotonic() + seconds)
        if time.monotonic() >= until:
            raise lost or ConnectionError(f"frames: expected {first.name} to go on; got its end. Check the source.")
        time.sleep(min(_PAUSE_S, seconds))


def _whole(what: str, how: Reading) -> None:
    """Refuse a part of what cannot be wound to."""
    if how.start or how.stop is not None:
        raise ValueError(f"frames: expected start_s and stop_s with a video file only; got {what}. Leave them out.")


def _iterated(source: Iterable[Any], how: Reading) -> Generator[Picture, None, None]:
    """Items with times (`Frame`, pairs) keep them; others follow at `rate`."""
    for index, item in enumerate(source):
        t, lasts = index / how.rate, 1 / how.rate
        if isinstance(item, Frame):
            t, lasts, item = item.t, 0.0, item.image
        elif isinstance(item, tuple) and len(item) == 2:
            (t, item), lasts = item, 0.0
        image = rgb(item, how.max_pixels)
        yield Picture(float(t), lasts, partial(_same, image))


def _same(image: torch.Tensor) -> torch.Tensor:
    return image


def _folder(path: Path, how: Reading) -> Opened:
    """Images by name, numbers in it read as numbers: 2.png before 10.png."""
    files = [file for file in path.iterdir() if file.suffix.lower() in _ENDING]
    if not files:
        raise ValueError(f"frames: expected images ({', '.join(_ENDING)}) in {path}; got none. Name another folder.")
    _whole("a folder", how)
    files.sort(key=lambda file: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", file.name)])

    def pictures() -> Generator[Picture, None, None]:
        for index, file in enumerate(files):
            yield Picture(index / how.rate, 1 / how.rate, partial(_load, file, how.max_pixels))

    return Opened(str(path), False, len(files) / how.rate, pictures())


def _load(file: Path, max_pixels: int | None) -> torch.Tensor:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return rgb(image, max_pixels)
    except OSError as error:
        raise ValueError(f"frames: expected an image in {file}; got {error}. Delete or replace the file.") from error
