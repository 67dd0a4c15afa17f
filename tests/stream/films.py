"""Small films made on the spot: every picture is one grey, so that its number can be read off."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np


def grey(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A picture whose every value is 8 x its number."""
    return np.full((height, width, 3), 8 * number, np.uint8)


def film(path: Path, pictures: int, rate: int = 10, size: tuple[int, int] = (48, 64)) -> Path:
    """A lossless video of `pictures` greys, `rate` a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1" if path.suffix == ".mkv" else "mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(pictures):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(number, *size), format="rgb24")))
        container.mux(stream.encode())
    return path


def number(image: object) -> int:
    """The number of a grey picture."""
    return round(float(np.asarray(image, np.float64).mean()) / 8)
