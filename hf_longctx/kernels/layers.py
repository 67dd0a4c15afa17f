"""Operations, as `ops.py` has them, that a model's layers are made of: norms, rotations, products with weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import dispatch


def rotate(x: Tensor, delta: Tensor, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """Turn rotary embeddings further by `delta` positions; channels beyond R stay.

    Args:
        x: `[B, H, T, D]`.
        delta: `[B or 1, T]`, int64, positions to add; small numbers keep float32 angles exact.
        inv_freq: `[R/2]`, float32, R <= D.
        interleaved: pairs are channels (2i, 2i+1) instead of (i, i + R/2).

    Returns:
        `[B, H, T, D]`, dtype of x; computed in float32, or float64 if x is.
    """
    out: Tensor = dispatch.call("rotate", x, delta, inv_freq, interleaved)
    return out


def rotate_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Turn queries and keys to their positions: pairs are channels (i, i + size/2), and those from `size` on stay.

    They become `x[i] * cos[i] - x[j] * sin[i]` and `x[j] * cos[j] + x[i] * sin[j]`, where `j = i + size/2`. If cos has
    the dtype of q, each product is rounded to it before they are added.

    Args:
        q: `[B, Hq, T, D]`.
        k: `[B, Hkv, T, D]`, dtype of q; Hkv may be 0.
        cos: `[B or 1, T, size]`, or `[B or 1, T, size/2]`, one for each pair; in the dtype of q or float32.
        sin: likewise.
        size: channels that turn, even, at most D.

    Returns:
        `[B, Hq, T, D]` and `[B, Hkv, T, D]`, dtype of q.
    """
    out: tuple[Tensor, Tensor] = dispatch.call("rotate_heads", q, k, cos, sin, size)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, early: bool, of_row: Tensor | None = None) -> Tensor:
    """Rows by the root of their mean square, times a weight: `x * rsqrt(mean(x^2) + eps) * (weight + offset)`.

    Computed in float32.

    Args:
        x: `[..., D]`.
        weight: `[D]`, or `[W, D]` if there is `of_row`.
        eps: added to the mean.
        offset: added to the weight.
        early: rows are rounded to the dtype of x before they meet the weight, and the result has the wider of both
            dtypes; else all is rounded once, to the dtype of x.
        of_row: `[len(x)]`, int64, which weight is that of each row along the first axis; None: there is one for all.

    Returns:
        The shape of x.
    """
    out: Tensor = dispatch.call("rms_norm", x, weight, eps, offset, early, of_row)
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, each of the two rounded to the dtype of `gate`.

    Args:
        gate: any shape.
        up: of the same shape and dtype.

    Returns:
        The shape and dtype of `gate`.
    """
    out: Tensor = dispatch.call("gated", gate, up)
    return out


def project(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Products of rows with several weights: `x @ weight.T + bias` of each; sums may run in any order.

    Args:
        x: `[R, K]`.
        weights: each `[N, K]`, dtype of x.
        biases: each `[N]` or None.

    Returns:
        For each weight `[R, N]`, dtype of x.
    """
    out: tuple[Tensor, ...] = dispatch.call("project", x, weights, biases)
    return out


def project_gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """`silu(x @ gate.T) * (x @ up.T)`, each of the three parts rounded to the dtype of x.

    Args:
        x: `[R, K]`.
        gate: `[N, K]`, dtype of x.
        up: likewise.

    Returns:
        `[R, N]`, dtype of x.
    """
    out: Tensor = dispatch.call("project_gated", x, gate, up)
    return out
