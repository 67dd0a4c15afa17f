"""Frames of a stream: one type for files, folders, cameras, network streams and iterators."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Frame:
    """One picture of a stream.

    Attributes:
        t: seconds since the first frame.
        image: `[H, W, 3]`, uint8, RGB, on the CPU. Size may change from frame to frame.
    """

    t: float
    image: torch.Tensor
