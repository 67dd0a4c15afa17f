"""How far a weight's grid reaches, and to which of its values each weight goes, so that outputs change least.

Paper: QServe (arXiv:2405.04532) §4.3.4, weight clipping; GPTQ (arXiv:2210.17323) §3.
Differs: the better of GPTQ's codes and of the nearest ones is kept, output channel by output channel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import QoQConfig
from ..grids import Grid, bytes_grid, channel_grid, group_grid, row_scale

SHRINKS = tuple(1 - 0.025 * i for i in range(25))
"""Shares of the range that are tried: 1.0 to 0.4."""

_DAMP = 0.01
_BLOCK = 128


def output_error(change: Tensor, moments: Tensor) -> Tensor:
    """Mean squared change of each output, for a change `[N, K]` of the weight: `[N]`.

    Args:
        change: of the weight.
        moments: `[K, K]`, mean of the products of inputs.
    """
    return ((change @ moments) * change).sum(1)


def fit(weight: Tensor, config: QoQConfig, moments: Tensor) -> Grid:
    """The grid of a weight whose reach changes outputs least.

    Args:
        weight: `[N, K]` float32.
        config: bits and groups.
        moments: `[K, K]` float32, mean of the products of inputs.
    """
    if config.kind == "group":
        return _fit_groups(weight, config.group_size, moments)
    make: Callable[[Tensor, Tensor | float], Grid] = bytes_grid if config.kind == "w8" else channel_grid
    best, least = torch.ones_like(weight[:, :1]), torch.full_like(weight[:, 0], torch.inf)
    for shrink in SHRINKS:
        grid = make(weight, shrink)
        error = output_error(grid.values(grid.codes(weight)) - weight, moments)
        better = error < least
        best[better], least = shrink, torch.minimum(error, least)
    return make(weight, best)


def _fit_groups(weight: Tensor, group: int, moments: Tensor) -> Grid:
    """As `fit`, each group by the moments of its own inputs."""
    scale = row_scale(weight)
    own = torch.stack([moments[i : i + group, i : i + group] for i in range(0, len(moments), group)])
    best = weight.new_ones(weight.shape[0], weight.shape[1] // group)
    least = torch.full_like(best, torch.inf)
    for shrink in (1.2, 1.1, *SHRINKS):  # a longer range may have the better of two whole steps
        grid = group_grid(weight, scale, group, shrink)
        change = (grid.values(grid.codes(weight)) - weight).view(len(weight), -1, group)
        error = ((change.transpose(0, 1) @ own).transpose(0, 1) * change).sum(2)
        better = error < least
        best[better], least = shrink, torch.minimum(error, least)
    return group_grid(weight, scale, group, best)


def gptq(weight: Tensor, grid: Grid, moments: Tensor) -> Tensor:
    """Codes `[N, K]` of a weight, rounded one input channel after another; what is left over goes to those to come.

    Channels come in the order of their mean square, the largest first.

    Args:
        weight: `[N, K]` float32.
        grid: of the weight; it stays.
        moments: `[K, K]` float32, mean of the products of inputs.

    Raises:
        RuntimeError: moments that are not finite.
    """
    nearest = grid.codes(weight)
    size = moments.diagonal()
    order = size.argsort(descending=True, stable=True)
    step, offset, high = (x[:, order] for x in grid.spread(weight.shape[1]))
    spread = _spread(moments[order][:, order])
    left, codes = weight[:, order].clone(), torch.empty_like(weight)
    for first in range(0, len(order), _BLOCK):
        stop = min(first + _BLOCK, len(order))
        errors = torch.empty_like(left[:, first:stop])
        part, within = left[:, first:stop].clone(), spread[first:stop, first:stop]
        for i in range(stop - first):
            at = first + i
            code = ((part[:, i] - offset[:, at]) / step[:, at]).round().clamp(min=grid.low).minimum(high[:, at])
            error = (part[:, i] - (code * step[:, at] + offset[:, at])) / within[i, i]
            part[:, i:] -= error[:, None] * within[i, i:]
            codes[:, at], errors[:, i] = code, error
        left[:, stop:] -= errors @ spread[first:stop, stop:]
    found = torch.empty_like(codes)
    found[:, order] = codes
    before, after = (output_error(grid.values(x) - weight, moments) for x in (nearest, found))
    return torch.where((after < before)[:, None], found, nearest)


def _spread(moments: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped moments: how an error is spread over later channels."""
    mean = moments.diagonal().mean()
    if not bool(mean.isfinite()):
        raise RuntimeError(
            f"gptq: expected finite inputs; got a mean square of {float(mean)}. Use float32 or bfloat16."
        )
    damped = moments.double()
    damped.diagonal().add_((_DAMP * mean).double().clamp(min=1e-30))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.to(moments.dtype)
