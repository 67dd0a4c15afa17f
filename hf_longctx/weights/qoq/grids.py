"""The values that a quantized weight may take, and how a weight is put on them. Arithmetic only: no module, no file.

Paper: QServe (arXiv:2405.04532) §4.1, progressive group quantization.
Differs: a weight goes to the 4-bit grid in one rounding, not by way of its 8-bit value; the zero of a group is any
whole 8-bit number (after the scale, "post-scale") and that of a channel any number, so that a grid begins exactly where
weights do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.linear import Codes
from .config import QoQConfig

PROTECTED = 120
"""Largest level-1 code, as published for zeros after the scale: what rounding to the second level adds is still a
signed byte but for ties, and `Grid.high` has those."""

_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Grid:
    """Evenly spaced values: `offset + step * code`, for whole codes from `low` to `high`.

    Attributes:
        step: `[N, G]` float32, above 0.
        offset: `[N, G]` float32.
        low: smallest code.
        high: `[N, G]` float32, the largest code.
        scale: `[N]` float32: of the row.
        steps: `[N, G]` int32: group-wise, the step in units of `scale`; None: one group, whose step is `scale`.
        zeros: `[N, G]` int32: group-wise, the offset in units of `scale`, a signed byte; None otherwise.
    """

    step: Tensor
    offset: Tensor
    low: int
    high: Tensor
    scale: Tensor
    steps: Tensor | None = None
    zeros: Tensor | None = None

    def spread(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Step, offset and highest code of each of `width` input channels: `[N, width]` each."""
        times = width // self.step.shape[1]
        step, offset, high = (x.repeat_interleave(times, 1) for x in (self.step, self.offset, self.high))
        return step, offset, high

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest codes of a weight `[N, K]`: `[N, K]` float32, whole."""
        step, offset, high = self.spread(weight.shape[1])
        return torch.minimum(((weight.float() - offset) / step).round().clamp(min=self.low), high)

    def values(self, codes: Tensor) -> Tensor:
        """What codes `[N, K]` stand for: `[N, K]` float32."""
        step, offset, _ = self.spread(codes.shape[1])
        return codes.float() * step + offset

    def form(self, codes: Tensor) -> Codes:
        """Codes `[N, K]` and what they stand for, as kernels have it."""
        whole = codes.to(torch.int8 if self.low < 0 else torch.uint8)
        if self.steps is not None and self.zeros is not None:
            return Codes(whole, self.scale, None, self.steps.to(torch.int8), self.zeros.to(torch.int8))
        return Codes(whole, self.scale, None if self.low < 0 else -self.offset[:, 0])


def bytes_grid(weight: Tensor, shrink: Tensor | float = 1.0) -> Grid:
    """Eight bits, symmetric, a scale for each output channel.

    Args:
        weight: `[N, K]`.
        shrink: share of the largest weight that the grid reaches, or `[N, 1]` of them.
    """
    reach = weight.float().abs().amax(1, keepdim=True) * shrink
    scale = (reach / 127).clamp(min=_SMALLEST)
    high = torch.full_like(scale, 127)
    return Grid(scale, torch.zeros_like(scale), -127, high, scale[:, 0])


def channel_grid(weight: Tensor, shrink: Tensor | float = 1.0) -> Grid:
    """Four bits, asymmetric, a scale and a zero for each output channel.

    Args:
        weight: `[N, K]`.
        shrink: share of the smallest and of the largest weight that the grid reaches, or `[N, 1]` of them.
    """
    weight = weight.float()
    low = weight.amin(1, keepdim=True).clamp(max=0) * shrink
    high = weight.amax(1, keepdim=True).clamp(min=0) * shrink
    step = ((high - low) / 15).clamp(min=_SMALLEST)
    return Grid(step, low, 0, torch.full_like(step, 15), step[:, 0])


def row_scale(weight: Tensor) -> Tensor:
    """Scale of the first level of a group-wise weight `[N, K]`: `[N]` float32."""
    return (weight.float().abs().amax(1) / PROTECTED).clamp(min=_SMALLEST)


def group_grid(weight: Tensor, scale: Tensor, group: int, shrink: Tensor | float = 1.0) -> Grid:
    """Four bits in two levels: a scale for each output channel, and a whole step and zero for each group of inputs.

    Args:
        weight: `[N, K]`, K a multiple of `group`.
        scale: `[N]` float32, of the first level.
        group: input channels of a group.
        shrink: share of a group's range that the grid reaches, also above 1, or `[N, K / group]` of them.
    """
    parts = (weight.float() / scale[:, None]).view(len(weight), -1, group)
    low = (parts.amin(2).clamp(max=0) * shrink).clamp(min=-PROTECTED)
    high = (parts.amax(2).clamp(min=0) * shrink).clamp(max=PROTECTED)
    zeros = low.round()
    # The smallest whole step that has the largest weight within half a step of the last code. To round to the nearest
    # step, as the paper does, loses a third of a range of 22.
    steps = ((high - zeros) / 15.5).ceil().clamp(1, 16)
    top = ((127 - zeros) / steps).floor().clamp(max=15)
    level = scale[:, None]
    return Grid(steps * level, zeros * level, 0, top, scale, steps.int(), zeros.int())


def nearest_grid(weight: Tensor, config: QoQConfig) -> Grid:
    """The grid of a weight `[N, K]` that reaches over all of it."""
    if config.kind == "group":
        return group_grid(weight, row_scale(weight), config.group_size)
    return bytes_grid(weight) if config.kind == "w8" else channel_grid(weight)
