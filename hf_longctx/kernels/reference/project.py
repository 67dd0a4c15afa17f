"""Products with weights, and what a gate does between them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear, silu


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """The definition of `ops.gated`."""
    return silu(gate) * up


def project(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The definition of `layers.project`."""
    return tuple(linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))


def project_gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The definition of `layers.project_gated`."""
    return gated(linear(x, gate), linear(x, up))
