"""One-bit deltas in Triton, written the obvious way: a baseline of `delta.py`.

As in the paper's code, row t of a batch belongs to tenant t: each program unpacks a tile of one tenant's signs into the
dtype of x and multiplies it with `tl.dot`, whose rows are filled up to 16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CONFIGS = ((32, 128), (64, 128), (128, 64), (64, 64))
"""Outputs and inputs of a tile; the fastest is the baseline."""


@triton.jit
def _kernel(x, bits, scales, out, N, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    tenant, block = tl.program_id(0), tl.program_id(1)
    row, column, inner = tl.arange(0, 16), block * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    sums = tl.zeros((16, BLOCK_N), dtype=tl.float32)
    signs = bits + (tenant * N + column[None, :]).to(tl.int64) * (K // 32)
    for k in range(0, K, BLOCK_K):
        inputs = tl.load(x + tenant * K + row[:, None] * 0 + k + inner[None, :], mask=row[:, None] == 0, other=0.0)
        words = tl.load(signs + (k + inner[:, None]) // 32, mask=column[None, :] < N, other=0)
        set_ = (words >> (inner[:, None] % 32)) & 1
        sums = tl.dot(inputs, (2 * set_ - 1).to(x.dtype.element_ty), sums)
    sums *= tl.load(scales + tenant)
    at = out + tenant * N + row[:, None] * 0 + column[None, :]
    tl.store(at, sums.to(x.dtype.element_ty), mask=(row[:, None] == 0) & (column[None, :] < N))


def delta(x: Tensor, bits: Tensor, scales: Tensor, config: tuple[int, int]) -> Tensor:
    """The delta of row t by tenant t: `[T, N]`."""
    (tenants, inputs), outputs = x.shape, bits.shape[1]
    out = torch.empty(tenants, outputs, dtype=x.dtype, device=x.device)
    grid: Any = (tenants, triton.cdiv(outputs, config[0]))
    _kernel[grid](x, bits, scales, out, outputs, inputs, *config)
    return out
