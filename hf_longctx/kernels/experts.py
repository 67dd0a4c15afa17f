"""Quantized weights of experts, as `linear.py` has single ones: tokens sorted by expert, each times its expert's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import dispatch
from .linear import COLUMNS, LAYOUT, PackedWeight, Tokens


@dataclass(frozen=True)
class Sorted:
    """Rows, of which each is a token with one of its experts, in the order of experts.

    Args:
        order: `[S]`, int32: the rows, of expert 0 first; of one expert in their own order.
        places: `[S]`, int32: where each row went, `places[order[i]] = i`.
        ends: `[E]`, int32: where the rows of each expert end; those behind the last are of none.
    """

    order: Tensor
    places: Tensor
    ends: Tensor


@dataclass(frozen=True)
class PackedExperts:
    """Weights of one shape in stored order, one behind the other; each is a `linear.PackedWeight`.

    Args:
        codes: uint8, `[E, N', K' * bits / 8]`.
        scale: `[E, N]`, float32.
        shift: `[E, N]`, float32, or None.
        groups: uint8, `[E, N' / 64, K' / group, 64, 2]`, or None.
        columns: K.
        layout: version of the order.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None
    groups: Tensor | None
    columns: int
    layout: int = LAYOUT

    @property
    def bits(self) -> int:
        """Of a code: 4 or 8."""
        return 8 * self.codes.shape[2] // self.stored_columns

    @property
    def stored_columns(self) -> int:
        """K', K up to a multiple of 128."""
        return -(-self.columns // COLUMNS) * COLUMNS

    @property
    def group(self) -> int | None:
        """Columns of a group; None with one level."""
        return None if self.groups is None else self.stored_columns // self.groups.shape[2]

    def of(self, expert: int) -> PackedWeight:
        """The weight of one expert; no copy."""
        shift, groups = (None if x is None else x[expert] for x in (self.shift, self.groups))
        return PackedWeight(self.codes[expert], self.scale[expert], shift, groups, self.columns, self.layout)


def sort_experts(ids: Tensor, experts: int) -> Sorted:
    """Sort rows by their experts.

    Args:
        ids: `[S]`, int64: the expert of each; others than 0 to E - 1: none.
        experts: E.
    """
    order, places, ends = dispatch.call("sort_experts", ids, experts)
    return Sorted(order, places, ends)


def w4a8_experts(tokens: Tokens, weight: PackedExperts, by: Sorted, times: int, dtype: torch.dtype) -> Tensor:
    """`linear.w4a8_linear` of each row with the weight of its expert, without a bias.

    Args:
        tokens: `[S, K]` in the order of `by`, or, with `times`, `[S / times, K]` as they come.
        weight: E times `[N, K]`.
        by: the order of S rows.
        times: 0, or how many rows a token has: row i of `by.order` is of token `order[i] // times`.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        `[S, N]` in the order of `by`; rows of no expert hold anything.

    Raises:
        ValueError: shapes that do not fit each other, or a stored order that this version does not know.
    """
    if weight.layout != LAYOUT:
        raise ValueError(
            f"w4a8_experts: expected weights of layout {LAYOUT}; got {weight.layout}. Pack them again, or update."
        )
    got, count = tokens.values.shape, by.order.shape[0]
    if got[1] != weight.columns or got[0] * max(times, 1) != count:
        raise ValueError(
            f"w4a8_experts: expected {count} tokens of {weight.columns} channels, or one for {times} rows each; got "
            f"{list(got)}. Pass tokens that were made for these weights."
        )
    if by.ends.shape[0] != weight.scale.shape[0]:
        raise ValueError(
            f"w4a8_experts: expected rows sorted by {weight.scale.shape[0]} experts; got {by.ends.shape[0]}. "
            "Sort them by the experts that there are."
        )
    out: Tensor = dispatch.call("w4a8_experts", tokens, weight, by, times, dtype)
    return out


def combine_experts(rows: Tensor, by: Sorted, weights: Tensor) -> Tensor:
    """What each token gets: the sum of its rows times their weights, in float32 one after the other, rounded once.

    Args:
        rows: `[T * k, H]` in the order of `by`.
        by: of rows `t * k + i`.
        weights: `[T, k]`, floating point.

    Returns:
        `[T, H]`, dtype of the rows. Rows of no expert add nothing.
    """
    out: Tensor = dispatch.call("combine_experts", rows, by, weights)
    return out
