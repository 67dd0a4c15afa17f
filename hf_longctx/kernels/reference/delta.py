"""Linear layers with deltas, and gradients; of all deltas, a few rows of one are unpacked at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

WORD = 32
TILE = 16
"""Rows of a product: always as many, so that the sums of a row are made in the same order beside any others."""

CHUNK = 1 << 20
"""Signs that are unpacked at a time."""


def delta_linear(x: Tensor, base_out: Tensor, bits: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    """The definition of `delta.delta_linear`; slots: `[R, P]`."""
    wide = scales.dtype
    out = base_out.to(wide, copy=True)
    for slot, rows in _rows_of_slots(slots):
        tiles = _tiles(x[rows].to(wide))
        for some, weight in _chunks(bits[slot], scales[slot], wide):
            product = torch.cat([tile @ weight.t() for tile in tiles])[: len(rows)]
            out[rows, some] += product
    return out.to(base_out.dtype)


def linear_with_delta(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, scales: Tensor, slots: Tensor
) -> Tensor:
    """The definition of `delta.linear_with_delta`; slots: `[R, P]`."""
    wide = scales.dtype
    base = torch.cat([tile @ weight.to(wide).t() for tile in _tiles(x.to(wide))])[: len(x)]
    return delta_linear(x, base if bias is None else base + bias.to(wide), bits, scales, slots).to(x.dtype)


def linears_with_delta(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bits: Sequence[Tensor],
    scales: Sequence[Tensor],
    slots: Tensor,
) -> tuple[Tensor, ...]:
    """The definition of `delta.joined`; slots: `[R, P]`."""
    layers = zip(weights, biases, bits, scales, strict=True)
    return tuple(linear_with_delta(x, *layer, slots) for layer in layers)


def gradients(
    grad: Tensor, x: Tensor, bits: Tensor, scales: Tensor, slots: Tensor, of_x: bool, of_scales: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of `delta_linear` by x and by scales, given that by its result: `[R, K]` and the shape of scales."""
    wide = scales.dtype
    x_grad = torch.zeros(x.shape, dtype=wide, device=x.device) if of_x else None
    scales_grad = torch.zeros_like(scales) if of_scales else None
    ones = scales.new_ones(1, 1)
    for slot, rows in _rows_of_slots(slots):
        above = grad[rows].to(wide)
        if x_grad is not None:
            for some, weight in _chunks(bits[slot], scales[slot], wide):
                x_grad[rows] += above[:, some] @ weight
        if scales_grad is not None:
            inputs, into = x[rows].to(wide), scales_grad[slot]
            for some, signs in _chunks(bits[slot], ones, wide):
                each = ((above[:, some].t() @ inputs) * signs).view(len(signs), scales.shape[2], -1).sum(2)
                if len(into) == 1:
                    into += each.sum(0)
                else:
                    into[some] += each
    return None if x_grad is None else x_grad.to(x.dtype), scales_grad


def _rows_of_slots(slots: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each slot of each plane, and the rows that have it, in the order in which a row adds them up."""
    for plane in slots.unbind(1):
        for slot in sorted(set(plane.tolist())):
            if slot >= 0:
                yield slot, (plane == slot).nonzero()[:, 0]


def _tiles(x: Tensor) -> Tensor:
    """`[tiles, TILE, K]`, the last one filled up with zeros."""
    return torch.nn.functional.pad(x, (0, 0, 0, -len(x) % TILE)).view(-1, TILE, x.shape[1])


def _chunks(bits: Tensor, scales: Tensor, wide: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The delta of one slot, some outputs at a time: which ones, and `[n, K]`.

    Args:
        bits: `[N, K / 32]`, int32.
        scales: `[N or 1, groups]`.
        wide: dtype of the delta.
    """
    out, words = bits.shape
    step = max(1, CHUNK // (words * WORD))
    places = torch.arange(WORD, dtype=torch.int32, device=bits.device)
    for first in range(0, out, step):
        some = slice(first, min(first + step, out))
        signs = (bits[some, :, None] >> places & 1).to(wide).mul_(2).sub_(1)  # [n, K / 32, 32]
        scale = scales if len(scales) == 1 else scales[some]
        weight = signs.view(len(signs), scales.shape[1], -1) * scale[..., None]
        yield some, weight.view(len(signs), -1)
