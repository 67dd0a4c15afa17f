"""Rows sorted by experts, their products with the experts' quantized weights, and what tokens get of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..experts import PackedExperts, Sorted
from ..linear import Tokens
from .linear import w4a8_linear


def sort_experts(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `experts.sort_experts`."""
    known = torch.where((ids >= 0) & (ids < experts), ids, experts)
    ordered, order = known.sort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=ids.device)
    ends = torch.searchsorted(ordered, torch.arange(experts, device=ids.device), right=True)
    return order.int(), places.int(), ends.int()


def taken(tokens: Tokens, by: Sorted, times: int) -> Tokens:
    """Tokens in the order of rows."""
    if times == 0:
        return tokens
    at = torch.div(by.order, times, rounding_mode="floor")
    return Tokens(tokens.values[at], tokens.scale[at], tokens.sums[at])


def one_by_one(
    product: Callable[..., Tensor],
    tokens: Tokens,
    weight: PackedExperts,
    by: Sorted,
    times: int,
    dtype: torch.dtype,
) -> Tensor:
    """`experts.w4a8_experts` by a function for one weight, as `linear.w4a8_linear`; rows of no expert are zero."""
    tokens = taken(tokens, by, times)
    out = torch.zeros(len(tokens.values), weight.scale.shape[1], dtype=dtype, device=tokens.values.device)
    first = 0
    for expert, end in enumerate(by.ends.tolist()):
        if end > first:
            own = Tokens(tokens.values[first:end], tokens.scale[first:end], tokens.sums[first:end])
            out[first:end] = product(own, weight.of(expert), None, dtype)
        first = end
    return out


def w4a8_experts(tokens: Tokens, weight: PackedExperts, by: Sorted, times: int, dtype: torch.dtype) -> Tensor:
    """The definition of `experts.w4a8_experts`."""
    return one_by_one(w4a8_linear, tokens, weight, by, times, dtype)


def combine_experts(rows: Tensor, by: Sorted, weights: Tensor) -> Tensor:
    """The definition of `experts.combine_experts`."""
    tokens, top = weights.shape
    there = (by.places < by.ends[-1]).view(tokens, top, 1)
    parts = rows[by.places].view(tokens, top, -1).float() * weights.float()[..., None]
    sums = torch.zeros(tokens, rows.shape[1], dtype=torch.float32, device=rows.device)
    for i in range(top):
        sums = sums + torch.where(there[:, i], parts[:, i], 0.0)
    return sums.to(rows.dtype)
