"""Blocks that are read, and those that could be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LARGEST = 2**31 - 1
"""What is left of -1 without its sign: more than any block."""


def count_blocks(tally: Tensor, ids: Sequence[Tensor], pos: Tensor, block: int) -> None:
    """The definition of `count.count_blocks`."""
    every = torch.cat(list(ids), 1)
    last = pos // block  # of -1: -1
    read, seen = tally.unbind()
    read += ((every & _LARGEST) <= last[:, None, :, None]).sum()
    seen += (last + 1).expand(every.shape[0], -1).sum() * every.shape[1]
