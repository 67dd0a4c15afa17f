"""Quantized linears through torch's own products of int8 matrices (`torch._int_mm`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from .experts import PackedExperts, Sorted
from .linear import PackedWeight, Tokens
from .packing import int8_values, unpack
from .reference.experts import one_by_one
from .reference.linear import quantize_gated, quantize_tokens, scaled

LEAST_ROWS, STEP = 32, 8
"""What cuBLAS takes: more than 16 rows, and columns in multiples of 8."""


def reject(tokens: Tokens, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> str | None:
    """Why torch does not take these arguments, or None."""
    if tokens.values.device.type not in ("cpu", "cuda"):
        return f"has no products of int8 on {tokens.values.device.type}"
    return "takes no empty tensors" if not tokens.values.numel() else None


def reject_all(
    tokens: Tokens, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], dtype: torch.dtype
) -> str | None:
    """As `reject`."""
    return reject(tokens, weights[0], biases[0], dtype)


def w4a8_linear(tokens: Tokens, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`linear.w4a8_linear`; the weight is brought to int8 and natural order in every call."""
    x, w = tokens.values, int8_values(unpack(weight))
    if not x.is_cuda:
        return scaled(torch._int_mm(x, w.T), tokens, weight, bias, dtype)
    rows = pad(x, (0, 0, 0, max(0, LEAST_ROWS - len(x))))
    sums = torch._int_mm(rows, pad(w, (0, 0, 0, -len(w) % STEP)).T)[: len(x), : len(w)]
    return scaled(sums, tokens, weight, bias, dtype)


def w4a8_linears(
    tokens: Tokens, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Tensor]:
    """`linear.w4a8_linears`, one after the other."""
    return [w4a8_linear(tokens, weight, bias, dtype) for weight, bias in zip(weights, biases, strict=True)]


def reject_of(
    x: Tensor, up: Tensor | None, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]
) -> str | None:
    """As `reject`."""
    return reject(Tokens(x, x, x), weights[0], biases[0], x.dtype)


def w4a8_linears_of(
    x: Tensor, up: Tensor | None, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """`linear.w4a8_linears_of`, quantized as it is defined."""
    tokens = quantize_tokens(x) if up is None else quantize_gated(x, up)
    return w4a8_linears(tokens, weights, biases, x.dtype)


def reject_experts(tokens: Tokens, weight: PackedExperts, by: Sorted, times: int, dtype: torch.dtype) -> str | None:
    """As `reject`."""
    return reject(tokens, weight.of(0), None, dtype)


def w4a8_experts(tokens: Tokens, weight: PackedExperts, by: Sorted, times: int, dtype: torch.dtype) -> Tensor:
    """`experts.w4a8_experts`, one after the other; on a GPU, the host waits for where their tokens end."""
    return one_by_one(w4a8_linear, tokens, weight, by, times, dtype)
