"""Products of a few rows, each with a matrix of its own: output embeddings of many tenants."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch

FEW = 16
"""Rows up to which one call may do what is else a product for each matrix."""


def linear_of_rows(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor | None], table_of_row: Sequence[int], width: int
) -> Tensor | None:
    """Each row times the matrix of its number, if a backend does it in one call; None: none does.

    Products are summed up in float32 and rounded once. A row's result is the same to the last bit whatever the other
    rows are.

    Args:
        x: `[R, K]`.
        weights: `[N, K]` of each matrix, contiguous; dtype of x, or int8.
        scales: of each matrix the worth of a whole number, float32, `[N, 1]`; None for those that are not int8.
        table_of_row: number of the matrix of each row.
        width: outputs of a row, at least those of any matrix; `-inf` where its matrix has fewer.

    Returns:
        `[R, width]`, dtype of x, or None.

    Raises:
        ValueError: shapes do not fit, or there is no such matrix.
        TypeError: a dtype is another one.
    """
    _check(x, weights, scales, table_of_row, width)
    arguments = (x, weights, scales, table_of_row, width)
    if not 0 < len(x) <= FEW or dispatch.chosen("linear_of_rows", *arguments) != "compiled":
        return None
    out: Tensor = dispatch.call("linear_of_rows", *arguments)
    return out


def _check(
    x: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor | None], table_of_row: Sequence[int], width: int
) -> None:
    if x.ndim != 2 or len(table_of_row) != len(x):
        got = f"{list(x.shape)} and {len(table_of_row)}"
        raise _wrong("x [R, K] and a matrix for each row", got, "Flatten all axes but the last")
    if len(weights) != len(scales) or any(not 0 <= table < len(weights) for table in table_of_row):
        got = f"{len(weights)}, {len(scales)} scales, and {sorted(set(table_of_row))}"
        raise _wrong("matrices, scales or None of each, and numbers of these", got, "Name matrices that there are")
    for weight, scale in zip(weights, scales, strict=True):
        if weight.ndim != 2 or weight.shape[1] != x.shape[1] or len(weight) > width:
            raise _wrong(f"weights [up to {width}, {x.shape[1]}]", list(weight.shape), "Give each its own")
        if scale is not None and scale.shape != (len(weight), 1):
            raise _wrong(f"scales [{len(weight)}, 1]", list(scale.shape), "Give each output its own")
        dtypes = weight.dtype, None if scale is None else scale.dtype
        if dtypes not in ((x.dtype, None), (torch.int8, torch.float32)) or not x.is_floating_point():
            raise TypeError(
                f"linear_of_rows: expected weights of x's {x.dtype}, or int8 and float32 scales; got "
                f"{dtypes[0]} and {dtypes[1]}. Convert."
            )


def _wrong(what: str, got: object, do: str) -> ValueError:
    return ValueError(f"linear_of_rows: expected {what}; got {got}. {do}.")
