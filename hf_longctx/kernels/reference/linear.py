"""Quantized tokens, and their products with quantized weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..linear import PackedWeight, Tokens
from ..packing import int8_values, unpack
from .norm import rms_norm

LEAST = 2.0**-100
"""A row of smaller values counts as zero: 127 over its largest one could be infinite."""


def quantize_tokens(x: Tensor) -> Tokens:
    """The definition of `linear.quantize_tokens`."""
    rows = x.float()
    most = rows.abs().amax(-1)
    full = torch.full_like(most, 127.0)  # a number in its place would be divided by as a product with its reciprocal
    up = torch.where(most < LEAST, 0.0, full / most)
    values = (rows * up[:, None]).round().clamp(-127, 127)
    values = values.where(most.isfinite()[:, None], 0.0).to(torch.int8)
    scale = torch.where(most.isfinite(), most / full, torch.nan)
    return Tokens(values, scale, values.sum(-1, dtype=torch.int32))


def quantize_norm(x: Tensor, weight: Tensor, eps: float, offset: float, early: bool) -> tuple[Tensor, Tokens]:
    """The definition of `linear.quantize_norm`."""
    normed = rms_norm(x, weight, eps, offset, early)
    return normed, quantize_tokens(normed)


def quantize_gated(gate: Tensor, up: Tensor) -> Tokens:
    """The definition of `linear.quantize_gated`."""
    return quantize_tokens(silu(gate) * up)


def scaled(sums: Tensor, tokens: Tokens, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """From exact sums of products `[M, N]` to the result, each step rounded to float32."""
    out = sums.float() * weight.scale
    if weight.shift is not None:
        out = out - tokens.sums.float()[:, None] * weight.shift
    out = out * tokens.scale[:, None]
    return (out if bias is None else out + bias.float()).to(dtype)


def w4a8_linear(tokens: Tokens, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The definition of `linear.w4a8_linear`; float64 holds every sum exactly."""
    exact = tokens.values.double() @ int8_values(unpack(weight)).double().T
    return scaled(exact.to(torch.int32), tokens, weight, bias, dtype)


def w4a8_linears(
    tokens: Tokens, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Tensor]:
    """The definition of `linear.w4a8_linears`."""
    return [w4a8_linear(tokens, weight, bias, dtype) for weight, bias in zip(weights, biases, strict=True)]


def w4a8_linears_of(
    x: Tensor, up: Tensor | None, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """The definition of `linear.w4a8_linears_of`."""
    tokens = quantize_tokens(x) if up is None else quantize_gated(x, up)
    return w4a8_linears(tokens, weights, biases, x.dtype)
