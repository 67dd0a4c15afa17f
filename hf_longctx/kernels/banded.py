"""Sinks and a sliding window with gradients in one fused call, on any device: nothing is compiled for a length.

Queries are cut into blocks. Each reads the sinks and the band of keys before it, which are as many for every block, so
that all blocks are a batch of one call under one mask.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .types import Visibility

ALIGN = 8
"""Keys by which fused kernels want the rows of a mask to grow."""


def fits(see: Visibility, tokens: int, stored: int) -> bool:
    """True for a window without padding in a call that has all of its keys, some of which lie before a band."""
    if see.window is None or not see.aligned or tokens != stored:
        return False
    return tokens > edge_of(see.sink, see.window)


def edge_of(sink: int, window: int) -> int:
    """Queries, whole blocks, before the first whose band begins behind the sinks."""
    block, band = _sizes(sink, window)
    return -(-(band - block + sink) // block) * block


def attend_beyond(q: Tensor, k: Tensor, v: Tensor, scale: float, sink: int, window: int) -> Tensor:
    """What queries from `edge_of` on read.

    Args:
        q: `[B, Hq, T, D]`, all queries of the call.
        k: `[B, Hkv, T, D]`.
        v: `[B, Hkv, T, Dv]`.
        scale: factor of the products.
        sink: first tokens that every query sees.
        window: last tokens that it sees, its own included.

    Returns:
        `[B, Hq, T - edge, Dv]`.
    """
    (block, band), edge = _sizes(sink, window), edge_of(sink, window)
    rows, heads, tokens, _ = q.shape
    fill = (edge - tokens) % block
    asked = torch.unflatten(pad(q[:, :, edge:], (0, 0, 0, fill)), 2, (-1, block)).transpose(1, 2).flatten(0, 1)
    keys, values = (_bands(x, heads, sink, edge + block - band, fill, block, band) for x in (k, v))
    mask = _mask(sink, window, q.device, q.dtype)
    read = scaled_dot_product_attention(asked, keys, values, attn_mask=mask[None, None], scale=scale)
    return torch.unflatten(read, 0, (rows, -1)).transpose(1, 2).flatten(2, 3)[:, :, : tokens - edge]


def _bands(x: Tensor, heads: int, sink: int, start: int, fill: int, block: int, band: int) -> Tensor:
    """The sinks and each block's band from `start` on: `[B * N, Hq, sink + band, D]`."""
    bands = pad(x[:, :, start:], (0, 0, 0, fill)).unfold(2, band, block).transpose(3, 4)
    sinks = x[:, :, None, :sink].expand(-1, -1, bands.shape[2], -1, -1)
    both = torch.cat((sinks, bands), 3).transpose(1, 2).flatten(0, 1)
    return both.repeat_interleave(heads // x.shape[1], 1)


def _sizes(sink: int, window: int) -> tuple[int, int]:
    """Queries of a block, about as many as the window has tokens; and keys of its band, which end with its own."""
    block = min(max(128, -(-window // 64) * 64), 1024)
    return block, window - 1 + block + (1 - window - block - sink) % ALIGN


@cache  # never let go: what was recorded reads it where it is
def _mask(sink: int, window: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`[block, sink + band]`, 0 where a query of a block sees a key and -inf elsewhere; made once for all layers."""
    block, band = _sizes(sink, window)
    far = torch.arange(block, device=device)[:, None] - torch.arange(block - band, block, device=device)
    hidden = pad((far < 0) | (far >= window), (sink, 0), value=False)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill(hidden, float("-inf"))
