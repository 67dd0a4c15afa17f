"""Quantized linears, as `ops.py` has operations: int8 tokens, weights of 4 or 8 bits in the order that kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import dispatch

LAYOUT = 1
"""Version of the stored order of `PackedWeight`; another order gets another number."""
ROWS, COLUMNS = 64, 128
"""Rows of a panel, and the number of which stored columns are a multiple."""
GROUPS = (32, 64, 128)
"""Sizes of a group of columns that kernels know."""


@dataclass(frozen=True)
class Tokens:
    """Quantized activations: `x = values * scale`, one scale for each token.

    Args:
        values: `[M, K]`, int8, from -127 to 127, contiguous.
        scale: `[M]`, float32; not a number where the token holds what is not finite.
        sums: `[M]`, int32, of the values of each token.
    """

    values: Tensor
    scale: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Codes:
    """A quantized weight in its natural order; one of three forms, `W` being what tokens are multiplied with.

    - 4 bits per row: `W = values * scale - shift`, where `shift` is the scale times the zero point;
    - 4 bits, two levels: `W = (values * group_scale + group_zero) * scale`, the bracket computed in int8, modulo 256;
    - 8 bits: `W = values * scale`.

    Args:
        values: `[N, K]`; uint8, from 0 to 15, for 4 bits; int8 for 8.
        scale: `[N]`, float32.
        shift: `[N]`, float32; only with 4 bits per row.
        group_scale: `[N, K / group]`, int8, not negative; only with two levels.
        group_zero: likewise; `-zero * group_scale` for a zero point.
    """

    values: Tensor
    scale: Tensor
    shift: Tensor | None = None
    group_scale: Tensor | None = None
    group_zero: Tensor | None = None


@dataclass(frozen=True)
class PackedWeight:
    """A weight in stored order, which kernels read as it is; `packing.pack` and `packing.unpack` say how.

    Args:
        codes: uint8, `[N', K' * bits / 8]`; N' is N up to a multiple of 64, K' is K up to a multiple of 128.
        scale: `[N]`, float32.
        shift: `[N]`, float32, or None.
        groups: uint8, `[N' / 64, K' / group, 64, 2]`, or None.
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
    def shape(self) -> torch.Size:
        """`[N, K]`."""
        return torch.Size((len(self.scale), self.columns))

    @property
    def stored_columns(self) -> int:
        """K', K up to a multiple of 128."""
        return -(-self.columns // COLUMNS) * COLUMNS

    @property
    def bits(self) -> int:
        """Of a code: 4 or 8."""
        return 8 * self.codes.shape[1] // self.stored_columns

    @property
    def group(self) -> int | None:
        """Columns of a group; None with one level."""
        return None if self.groups is None else self.stored_columns // self.groups.shape[1]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        parts = (self.codes, self.scale, self.shift, self.groups)
        return sum(x.nbytes for x in parts if x is not None)


def quantize_tokens(x: Tensor) -> Tokens:
    """Quantize each row to int8, symmetrically: `scale = max|x| / 127`, `values = round(x * (127 / max|x|))`.

    Computed in float32; halves go to the even number. A row whose largest size is below 2^-100 has values of zero, and
    so has one that holds what is not finite, whose scale makes all that comes out of it NaN.

    Args:
        x: `[M, K]`, float32, float16 or bfloat16; K at most 65536.
    """
    out: Tokens = dispatch.call("quantize_tokens", x)
    return out


def quantize_norm(x: Tensor, weight: Tensor, eps: float, offset: float, early: bool) -> tuple[Tensor, Tokens]:
    """`ops.rms_norm` of x `[M, K]`, and `quantize_tokens` of that, which is rounded to its dtype in between.

    Returns:
        `[M, K]`, and its tokens.
    """
    out: tuple[Tensor, Tokens] = dispatch.call("quantize_norm", x, weight, eps, offset, early)
    return out


def quantize_gated(gate: Tensor, up: Tensor) -> Tokens:
    """`quantize_tokens` of `silu(gate) * up`, where both the SiLU and the product are rounded to the dtype of `up`.

    Args:
        gate: `[M, K]`; rows may lie apart.
        up: likewise, the same dtype.
    """
    out: Tokens = dispatch.call("quantize_gated", gate, up)
    return out


def w4a8_linear(tokens: Tokens, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`x W^T + bias` of quantized tokens and a quantized weight.

    The sum over K is exact, in integers; then, rounded to float32 one after the other: times `scale`, minus
    `tokens.sums * shift`, times the token's scale, plus the bias; and last to `dtype`.

    Args:
        tokens: `[M, K]`.
        weight: `[N, K]`.
        bias: `[N]`, float32, or None.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        `[M, N]`.

    Raises:
        ValueError: tokens and weight have different K, or the weight's order is none that this version knows.
    """
    _check(tokens, weight)
    out: Tensor = dispatch.call("w4a8_linear", tokens, weight, bias, dtype)
    return out


def w4a8_linears(
    tokens: Tokens, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None], dtype: torch.dtype
) -> list[Tensor]:
    """`w4a8_linear` with each of some weights: one launch on CUDA, where tokens are few.

    Args:
        tokens: `[M, K]`.
        weights: `[N, K]` each, of one number of bits, one size of groups.
        biases: as many, `[N]` or None.
        dtype: of the results.

    Returns:
        `[M, N]` each.

    Raises:
        ValueError: as `w4a8_linear`; weights of several forms, or another number of biases.
    """
    for weight in weights:
        _check(tokens, weight)
    _check_alike(weights, biases)
    out: list[Tensor] = dispatch.call("w4a8_linears", tokens, weights, biases, dtype)
    return out


def is_one_launch(x: Tensor) -> bool:
    """True if `w4a8_linears_of` makes 8 bits of x `[M, K]` in the launch of the product, by every block once again."""
    from .compiled import library
    from .compiled.linear import is_one

    return dispatch.wanted() in (None, "compiled") and library.reason(x.device) is None and is_one(x)


def w4a8_linears_of(
    x: Tensor, up: Tensor | None, weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """`w4a8_linears` of `quantize_tokens(x)` or of `quantize_gated(x, up)`: one launch on CUDA for one row.

    Args:
        x: `[M, K]`, float32, float16 or bfloat16; a gate, where there is `up`.
        up: `[M, K]`, which SiLU of the gate is multiplied with; or None.
        weights: `[N, K]` each, of one form.
        biases: as many, `[N]` or None.

    Returns:
        `[M, N]` each, in the dtype of x.

    Raises:
        ValueError: as `w4a8_linears`.
    """
    for weight in weights:
        _check_weight(x.shape[1], weight)
    _check_alike(weights, biases)
    out: list[Tensor] = dispatch.call("w4a8_linears_of", x, up, weights, biases)
    return out


def _check_alike(weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]) -> None:
    forms = {(weight.bits, weight.group) for weight in weights}
    if len(forms) != 1 or len(biases) != len(weights):
        raise ValueError(
            f"w4a8_linears: expected weights of one form, with a bias or None for each; got {len(weights)} weights of "
            f"(bits, group) {sorted(forms, key=str)} and {len(biases)} biases. Call w4a8_linear for each."
        )


def _check(tokens: Tokens, weight: PackedWeight) -> None:
    _check_weight(tokens.values.shape[1], weight)


def _check_weight(columns: int, weight: PackedWeight) -> None:
    if weight.layout != LAYOUT:
        raise ValueError(
            f"w4a8_linear: expected a weight of layout {LAYOUT}; got {weight.layout}. Pack it again, or update."
        )
    if columns != weight.columns:
        raise ValueError(
            f"w4a8_linear: expected tokens of {weight.columns} channels; got {columns}. "
            "Pass tokens that were made for this weight."
        )
