"""Operations, as `ops.py` has them, that a model's layers are made of: a norm, and the rotation of queries and keys."""

from __future__ import annotations

from torch import Tensor

from . import dispatch


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


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, early: bool) -> Tensor:
    """Rows by the root of their mean square, times a weight: `x * rsqrt(mean(x^2) + eps) * (weight + offset)`.

    Computed in float32.

    Args:
        x: `[..., D]`.
        weight: `[D]`.
        eps: added to the mean.
        offset: added to the weight.
        early: rows are rounded to the dtype of x before they meet the weight, and the result has the wider of both
            dtypes; else all is rounded once, to the dtype of x.

    Returns:
        The shape of x.
    """
    out: Tensor = dispatch.call("rms_norm", x, weight, eps, offset, early)
    return out
