"""Products with weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import linear, silu


def project(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The definition of `layers.project`."""
    return tuple(linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))


def project_gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The definition of `layers.project_gated`."""
    return silu(linear(x, gate)) * linear(x, up)
