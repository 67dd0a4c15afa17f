"""What is read back of keys and values that are stored in few bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .scene import Turn

LEAST_SCALE = 2.0**-14
"""The smallest normal number of float16."""


def read_back(x: Tensor, bits: int) -> Tensor:
    """Quantize each vector of `x` `[..., D]` over its channels, asymmetrically, and undo it.

    Scale and zero are rounded to float16, as they are stored; all else is computed in the dtype of x.
    """
    most = 2**bits - 1
    least, largest = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    floor = (x.abs().amax(-1, keepdim=True) / 2048).clamp(min=LEAST_SCALE)
    scale = torch.maximum((largest - least) / most, floor).to(torch.float16).to(x.dtype)
    zero = (-least / scale).to(torch.float16).to(x.dtype)
    payload = (x / scale + zero).round().clamp(0, most)
    return (payload - zero) * scale


def stored_positions(tokens: int, sink: int, lap: int | None) -> Tensor:
    """`[tokens]`, int64, the positions at which a row's keys are rotated when they are stored.

    Args:
        tokens: of the row.
        sink: tokens before the first lap.
        lap: positions stay below `sink + lap`: each lap starts at `sink` again; None: positions of the text.
    """
    return torch.tensor([p if lap is None or p < sink else sink + (p - sink) % lap for p in range(tokens)])


def keys_read_back(k: Tensor, bits: int, at: Tensor, turn: Turn) -> Tensor:
    """Keys `[H, n, D]`, not rotated, after they were stored in few bits at positions `[n]`."""
    at = at.expand(len(k), -1)
    return turn(read_back(turn(k, at), bits), -at)
