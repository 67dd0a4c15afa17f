"""`delta.joined` in Triton: layers that get the same rows, whose digits are written, or which are sorted, once."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear

from . import linear_with_delta
from .delta_linear import added, beside
from .signs import sorted_rows


def reject(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bits: Sequence[Tensor],
    scales: Sequence[Tensor],
    slots: Tensor,
) -> str | None:
    """Why the kernels do not take these arguments, or None."""
    if any(own.shape[2] != scales[0].shape[2] for own in scales):
        return "needs as many groups of inputs in all layers"
    layers = zip(weights, biases, bits, scales, strict=True)
    return next((why for layer in layers if (why := linear_with_delta.reject(x, *layer, slots)) is not None), None)


def run(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bits: Sequence[Tensor],
    scales: Sequence[Tensor],
    slots: Tensor,
) -> tuple[Tensor, ...]:
    """`delta.joined`; slots: `[R, P]`."""
    if not linear_with_delta.merges(x, slots):
        bases = [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        return added(x, bases, bits, scales, slots)
    x, order = beside(x), sorted_rows(slots.contiguous())
    layers = zip(weights, biases, bits, scales, strict=True)
    return tuple(linear_with_delta.merged(x, *layer, slots, order) for layer in layers)
