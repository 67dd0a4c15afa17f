"""One picture of a stream, whatever it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Frame:
    """One picture of a stream.

    Attributes:
        t: seconds since the start of the stream.
        image: `[H, W, 3]`, uint8, RGB, on the CPU. The size may change from frame to frame.
    """

    t: float
    image: torch.Tensor


def fit(height: int, width: int, max_pixels: int | None) -> tuple[int, int]:
    """The size of a picture that has at most `max_pixels`, of the same shape; never larger than it was."""
    if max_pixels is None or height * width <= max_pixels:
        return height, width
    scale = (max_pixels / (height * width)) ** 0.5
    return max(1, int(height * scale)), max(1, int(width * scale))


def rgb(picture: Any, max_pixels: int | None = None) -> torch.Tensor:
    """A picture as `Frame.image` holds it.

    Args:
        picture: a PIL image of any mode, or a uint8 numpy array or torch tensor: `[H, W]` grey, `[H, W, C]` or
            `[C, H, W]` with C of 1, 3 or 4 (the fourth is dropped). Where both could be meant the last axis is C.
        max_pixels: scale it down to no more.

    Returns:
        `[H, W, 3]`, uint8, on the CPU, contiguous.

    Raises:
        TypeError: no picture, or one that is not uint8.
        ValueError: of another shape, or empty.
    """
    from PIL import Image

    if isinstance(picture, Image.Image):
        array = np.array(picture.convert("RGB"))
    elif isinstance(picture, (np.ndarray, torch.Tensor)):
        array = _three(picture.detach().cpu().numpy() if isinstance(picture, torch.Tensor) else picture)
    else:
        raise TypeError(
            f"frames: expected pictures (PIL, numpy, torch), Frame or pairs of seconds and picture; "
            f"got {type(picture).__name__}. Convert each item to one of these."
        )
    size = fit(array.shape[0], array.shape[1], max_pixels)
    if size != array.shape[:2]:
        array = np.array(Image.fromarray(array).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _three(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`[H, W, 3]` of any of the accepted shapes."""
    if array.dtype != np.uint8:
        raise TypeError(f"frames: expected uint8 pictures, 0 to 255; got {array.dtype}. Scale and convert them first.")
    shape = array.shape
    if array.ndim == 2:
        array = array[:, :, None]
    elif array.ndim == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(
            f"frames: expected pictures of [H, W], [H, W, C] or [C, H, W] with C of 1, 3 or 4; got {list(shape)}. "
            "Yield one picture at a time."
        )
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else array[:, :, :3]
