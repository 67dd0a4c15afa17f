"""Rows and matrices of their own, one row after the other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def linear_of_rows(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor | None], table_of_row: Sequence[int], width: int
) -> Tensor:
    """The definition of `tables.linear_of_rows`."""
    out = x.new_full((len(x), width), -float("inf"))
    for row, table in enumerate(table_of_row):
        weight, scale = weights[table], scales[table]
        sums = weight.to(x.dtype).float() @ x[row].float()
        out[row, : len(weight)] = (sums if scale is None else sums * scale[:, 0]).to(x.dtype)
    return out
