"""How a cache lays out the keys of a block: found by writing numbers and looking where they lie."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_DIGITS = 128
"""Whole numbers below this are exact in every dtype of keys."""


def find_order(write: Callable[[Tensor], Tensor], block: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Where each key of a block lies: kernels tile keys in ways of their own, and say nothing about it.

    Args:
        write: stores keys `[block, dim]` and gives the block's numbers back, `[block * dim]`, as they lie.
        block: tokens.
        dim: channels.
        dtype: of the keys.

    Returns:
        `[block, dim]`, int64: `stored.flatten()[order]` are the keys.

    Raises:
        ValueError: what lies there is not a permutation of what was written.
    """
    numbers = torch.arange(block * dim)
    digits: list[Tensor] = []
    while len(digits) < 1 or _DIGITS ** len(digits) < len(numbers):
        digit = numbers // _DIGITS ** len(digits) % _DIGITS
        digits.append(write(digit.to(dtype).view(block, dim)).long() * _DIGITS ** len(digits))
    found = torch.stack(digits).sum(0)
    if not torch.equal(found.sort().values, numbers):
        raise ValueError(
            "find_order: expected a cache that keeps keys as they are, in another order; got other numbers back. "
            "Store keys in the model's dtype."
        )
    return found.argsort().view(block, dim)
