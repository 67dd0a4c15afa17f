"""Sums of antidiagonals as products of matrices of 16 bits, for GPUs without the compiled library."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .reference.attend import values_of
from .reference.score import query_tiles, shares_of
from .types import Packed

LOGITS = 1 << 26
"""Of tiles, that are held at a time, in float32."""


def reject(
    q: Tensor, k: Tensor | Packed, q_pos: Tensor, block: int, stride: int, scale: float, causal: bool, rounded: str = ""
) -> str | None:
    """Why torch does not take these arguments, or None."""
    if not q.is_cuda:
        return "sums 16 bits up in 32 on CUDA only"
    if rounded:
        return "rounds nothing to 8 bits"
    if k.dtype != q.dtype or q.dtype not in (torch.float16, torch.bfloat16):
        return "needs queries and keys in one dtype, float16 or bfloat16"
    return None if q.numel() and k.shape[2] else "takes no empty tensors"


@torch.no_grad()
def score_antidiagonal(
    q: Tensor, k: Tensor | Packed, q_pos: Tensor, block: int, stride: int, scale: float, causal: bool, rounded: str = ""
) -> Tensor:
    """`ops.score_antidiagonal`; nothing waits for the device."""
    (rows, heads, _, _), (kv_heads, stored) = q.shape, k.shape[1:3]
    tiles, places = block // stride, q_pos.view(q_pos.shape[0], -1, block)
    out = torch.zeros(rows, heads, places.shape[1], -(-stored // block), device=q.device)
    last = q_pos.amax(1) if causal else torch.full_like(q_pos[:, 0], stored - 1)
    keys = _key_tiles(values_of(k), last, stride)
    size = max(1, LOGITS // (rows * heads * tiles * keys.shape[2]))
    for first in range(0, places.shape[1], size):
        part = slice(first, min(first + size, places.shape[1]))
        tokens = slice(part.start * block, part.stop * block)
        queries, row_tile = query_tiles(q[:, :, tokens], places[:, part], stride, q.dtype)
        grouped = queries.reshape(rows * kv_heads, -1, queries.shape[-1])
        x = products(grouped, keys.flatten(0, 1).transpose(1, 2)).mul_(scale / stride)
        shares = shares_of(x.view(rows, heads, -1, tiles, keys.shape[2]), row_tile, causal)
        shares = torch.unflatten(pad(shares, (0, -keys.shape[2] % tiles)), -1, (-1, tiles)).sum(-1)
        out[:, :, part] = shares
    return out


def products(a: Tensor, b: Tensor) -> Tensor:
    """Of matrices of 16 bits, `[N, ., L]` and `[N, L, .]`, in float32."""
    return torch.bmm(a, b, out_dtype=torch.float32)


def _key_tiles(k: Tensor, last: Tensor, stride: int) -> Tensor:
    """Keys side by side, `[B, Hkv, tiles, stride * D]`; zero after each row's last place, `[B or 1]`."""
    after = torch.arange(k.shape[2], device=k.device) > last[:, None]
    keys = pad(k.masked_fill(after[:, None, :, None], 0.0), (0, 0, 0, -k.shape[2] % stride))
    return torch.unflatten(keys, 2, (-1, stride)).flatten(3)
