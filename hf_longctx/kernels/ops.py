"""Every operation: its contract, and the values that it takes. The table of contents of `kernels/`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import dispatch


@dataclass(frozen=True)
class Logits:
    """From a product to a logit: `softcap(scale * q.k) + slope * (k_pos - q_pos)`, then softmax with sinks.

    Args:
        scale: factor of the product, 1/sqrt(D) for Llama.
        softcap: `cap * tanh(x / cap)` if given (Gemma 2).
        sink_logits: `[Hq]`, one learned logit per head that takes part in the softmax and has no value (GPT-OSS).
        slopes: `[Hq]`, float32, ALiBi slope per head (MPT).
    """

    scale: float
    softcap: float | None = None
    sink_logits: Tensor | None = None
    slopes: Tensor | None = None

    def heads(self, index: Tensor) -> Logits:
        """The same for some of the query heads; index: `[Hq']`, int64."""
        sinks = None if self.sink_logits is None else self.sink_logits[index.to(self.sink_logits.device)]
        slopes = None if self.slopes is None else self.slopes[index.to(self.slopes.device)]
        return Logits(self.scale, self.softcap, sinks, slopes)

    @property
    def plain(self) -> bool:
        """True if the product is only scaled."""
        return self.softcap is None and self.sink_logits is None and self.slopes is None


@dataclass(frozen=True)
class Turns:
    """How queries are turned to keys that are rotated at lap positions (`cache/positions.py`).

    Args:
        sink_pos: `[B or 1, T]`, int64, position from which each query sees the sinks.
        lap: tokens in a lap; a key of the lap before is seen from one lap further on.
        offset: tokens before the first lap.
        inv_freq: `[R/2]`, float32, rotary frequencies; None for a layer without rotary embedding.
        interleaved: True if rotated pairs are channels (2i, 2i+1), False if (i, i + R/2).
    """

    sink_pos: Tensor
    lap: int
    offset: int
    inv_freq: Tensor | None = None
    interleaved: bool = False

    def laps(self, pos: Tensor) -> Tensor:
        """Whole laps before a position, same shape."""
        return (pos - self.offset).clamp(min=0) // self.lap


@dataclass(frozen=True)
class Visibility:
    """Which keys a query sees: `0 <= k_pos <= q_pos`, and `k_pos < sink` or `q_pos - k_pos < window` (None: all).

    Args:
        sink: first tokens that every later query sees.
        window: last tokens that a query sees, itself included.
        q_pos: `[B or 1, T]`, int64; None: query t stands at column `S - T + t`.
        k_pos: `[B or 1, S]`, int64, -1 for an empty column; None: columns are positions.
    """

    sink: int = 0
    window: int | None = None
    q_pos: Tensor | None = None
    k_pos: Tensor | None = None

    @property
    def aligned(self) -> bool:
        """True if columns are positions and the last query stands at the last column."""
        return self.q_pos is None and self.k_pos is None


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, logits: Logits, see: Visibility, turns: Turns | None) -> Tensor:
    """Attention of many queries; keys are in the order of their positions and the last T of them are the queries' own.

    Time is O(T * (sink + window)) and extra memory does not grow with T where there is a window.

    Args:
        q: `[B, Hq, T, D]`; with `turns`, rotated at the query's lap position.
        k: `[B, Hkv, S, D]`, Hq a multiple of Hkv, S >= T.
        v: `[B, Hkv, S, Dv]`.
        logits: from products to logits.
        see: which keys each query sees.
        turns: how queries are turned to keys at lap positions; None: products are right as they are.

    Returns:
        `[B, Hq, T, Dv]`, dtype of q; zero where a query sees nothing.

    Raises:
        UnsupportedError: the backend asked for does not take these arguments.
    """
    out: Tensor = dispatch.call("attend_blocks", q, k, v, logits, see, turns)
    return out


def attend_pages(q: Tensor, k: Tensor, v: Tensor, logits: Logits, see: Visibility, turns: Turns | None) -> Tensor:
    """Attention of a few queries (decode); keys in any order, so `see.k_pos` speaks for each column.

    Arguments, result and errors as `attend_blocks`.
    """
    out: Tensor = dispatch.call("attend_pages", q, k, v, logits, see, turns)
    return out


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


def append(store: Tensor, fresh: Tensor, slots: Tensor | int, written: Tensor | None = None) -> None:
    """Write tokens into a store, in place.

    Args:
        store: `[B, Hkv, C, D]`.
        fresh: `[B, Hkv, T, D]`, any dtype; cast to the store's.
        slots: first slot of the T tokens if all rows are alike; else `[B, T]`, int64, one slot per token.
        written: `[B, T]`, bool; tokens where it is False leave the store as it was. Only with a slot per token.
    """
    dispatch.call("append", store, fresh, slots, written)


def take_tokens(x: Tensor, index: Tensor) -> Tensor:
    """`out[b, :, t] = x[b, :, index[b, t]]`: tokens of each row, in another order.

    Args:
        x: `[B, H, T, D]`.
        index: `[B, N]`, int64.

    Returns:
        `[B, H, N, D]`.
    """
    return torch.gather(x, 2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
