"""The values that operations take beside tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
        clamp: keys further from the query than this are read at just this distance; None: as they are. With it,
            `sink_pos` is not used.
    """

    sink_pos: Tensor
    lap: int
    offset: int
    inv_freq: Tensor | None = None
    interleaved: bool = False
    clamp: int | None = None

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


@dataclass(frozen=True)
class Packed:
    """Quantized keys or values as they are stored: `value = (payload - zero) * scale`, per token and head.

    Args:
        payload: uint8, `[B, H, S, D]` of 8 bits, or `[B, H, S, D / 2]` of 4: channel 2i in the low half, 2i + 1 in the
            high half of byte i.
        scale: `[B, H, S]`, float16, never 0.
        zero: `[B, H, S]`, float16, not a whole number.
        bits: 4 or 8.
        dtype: of the values.
    """

    payload: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        """Of the values: `[B, H, S, D]`."""
        return torch.Size((*self.payload.shape[:3], self.payload.shape[3] * 8 // self.bits))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Payload, scale and zero, each `[B, H, S, ?]`, sharing memory with it."""
        return self.payload, self.scale[..., None], self.zero[..., None]

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.payload.device

    @property
    def nbytes(self) -> int:
        """Of all three tensors."""
        return self.payload.nbytes + self.scale.nbytes + self.zero.nbytes


def slots(x: Tensor | Packed) -> Tensor:
    """The tensor of a store in which every token of a head has a row: `[B, H, S, ?]`."""
    return x if isinstance(x, Tensor) else x.payload


def parts(x: Tensor | Packed) -> tuple[Tensor, ...]:
    """The tensors of either format, each `[B, H, S, ?]`, sharing memory with `x`."""
    return (x,) if isinstance(x, Tensor) else x.tensors


@dataclass(frozen=True)
class Selection:
    """Which blocks of keys each block of queries reads: the only currency between choosing and reading.

    Args:
        ids: `[B, Hs, N, K]`, int32; blocks by their place in the text, ascending, then -1 for none. Hs is 1, Hkv or Hq.
        block: tokens of a block of keys.
        q_block: queries of a block; block n is queries `n * q_block` to `(n + 1) * q_block - 1` of the call.
        pages: `[B, Hs, N, K]`, int32, where each block lies in the stored tensors, in blocks; None: at its id.
        far: places of K, the first ones, that may hold a key outside the local window of a query that reads it; None:
            all may, or nobody knows.
    """

    ids: Tensor
    block: int
    q_block: int
    pages: Tensor | None = None
    far: int | None = None


@dataclass(frozen=True)
class Places:
    """Where the blocks of a row and KV head lie on the device, whose store lies in host memory; all in blocks.

    First the sinks, then a ring in which the last blocks go round, then a pool for whatever else is read. While a text
    is short, there are no more places than it has blocks.

    Args:
        block: tokens of a block.
        sinks: blocks of sinks.
        tail: blocks that go round.
    """

    block: int
    sinks: int
    tail: int

    def page(self, ids: Tensor) -> Tensor:
        """The place of a block that is among the sinks or the last ones."""
        return torch.where(ids < self.sinks, ids, self.sinks + (ids - self.sinks) % self.tail)

    def paged(self, k: Tensor | Packed, v: Tensor | Packed) -> list[Tensor]:
        """All tensors of keys and values in blocks: `[B, H, P, block * ?]`, sharing memory."""
        return [x.view(*x.shape[:2], -1, self.block * x.shape[3]) for x in (*parts(k), *parts(v))]

    def is_far(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Which blocks have no place of their own any more in rows of so many tokens; bool, of the common shape."""
        return (ids >= self.sinks) & (ids <= (lengths - 1) // self.block - self.tail)


@dataclass(frozen=True)
class HostBlocks:
    """Blocks of keys and values in host memory, or in files that are mapped into it.

    Args:
        segments: `[B, Hkv, n, bytes]` each, uint8: block j lies in segment `j // n`, at place `j % n`; its bytes in
            every tensor of keys and values, one after the other.
        table: `[len(segments)]`, int64, their addresses, on the device, which reads and writes there by itself; None:
            it cannot.
    """

    segments: list[Tensor]
    table: Tensor | None
