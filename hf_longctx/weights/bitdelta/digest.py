"""A number that tells two tensors apart, the same on every device; and one for a whole model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .split import whole_weight

_STRIDE = 0x9E3779B97F4A7C15 - 2**64
"""Odd: then each place has a factor of its own, and a change of any one word changes the sum."""

DIGITS = 16
"""Of a checksum."""

_CHUNK = 1 << 20


def checksum(tensor: Tensor) -> str:
    """Sixteen hexadecimal digits that change with any one value, with the shape and with the type.

    It guards against damage and mistakes, not against somebody who means to deceive.
    """
    words = _words(tensor.detach().contiguous().view(-1))
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for start in range(0, len(words), _CHUNK):
        part = words[start : start + _CHUNK]
        places = torch.arange(start, start + len(part), dtype=torch.int64, device=words.device)
        total += ((2 * places + 1) * _STRIDE * (part + 1)).sum()
    about = f"{int(total)} {tuple(tensor.shape)} {tensor.dtype}"
    return hashlib.sha256(about.encode()).hexdigest()[:DIGITS]


def weight_checksum(weight: Tensor) -> str:
    """Two checksums of a weight one after the other: as it is in bfloat16, and as it is in float16."""
    return checksum(weight.detach().to(torch.bfloat16)) + checksum(weight.detach().to(torch.float16))


def same_weight(weight: Tensor, known: str) -> bool:
    """True if a weight, in 32 or 16 bits, is the one of a `weight_checksum`, which may be of one in another type."""
    weight = whole_weight(weight.detach())
    if weight.dtype == torch.float16:
        return checksum(weight) == known[DIGITS:]
    return checksum(weight.to(torch.bfloat16)) == known[:DIGITS]


def of_model(checksums: Mapping[str, str]) -> str:
    """One digest of all of a model's tensors."""
    lines = "\n".join(f"{name} {value}" for name, value in sorted(checksums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _words(flat: Tensor) -> Tensor:
    """The bytes of `[n]` as int64; zeros fill the last word."""
    raw = flat.view(torch.uint8)
    lacking = -len(raw) % 8
    if lacking:
        raw = torch.cat([raw, raw.new_zeros(lacking)])
    return raw.view(torch.int64)
