"""Rotary embedding: by a further angle, and to a position."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, delta: Tensor, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """The definition of `ops.rotate`."""
    work = torch.promote_types(x.dtype, torch.float32)
    angle = delta[:, None, :, None].to(work) * inv_freq.to(device=x.device, dtype=work)
    cos, sin = angle.cos(), angle.sin()
    size = 2 * inv_freq.shape[0]
    part, rest = x[..., :size].to(work), x[..., size:]
    if interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = part[..., : size // 2], part[..., size // 2 :]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned.to(x.dtype), rest), -1) if rest.shape[-1] else turned.to(x.dtype)


def rotate_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The definition of `ops.rotate_heads`."""
    if cos.shape[-1] < size:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    cos, sin = cos[:, None], sin[:, None]
    return _turned(q, cos, sin, size), _turned(k, cos, sin, size)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, size: int) -> Tensor:
    part, rest = x[..., :size], x[..., size:]
    first, second = part.chunk(2, -1)
    out = (part * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
    return torch.cat((out, rest), -1) if rest.shape[-1] else out
