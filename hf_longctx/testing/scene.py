"""One row of one layer, as one group of heads sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .visible import Span

Turn = Callable[[Tensor, Tensor], Tensor]
"""Rotates `x` `[..., D]` to positions `[...]`."""


@dataclass(frozen=True)
class Logits:
    """From products to weights, as in the model: `softcap(scale * q.k)`, then softmax with learned sinks `[Hq]`."""

    scale: float
    softcap: float | None
    sinks: Tensor | None


@dataclass(frozen=True)
class Scene:
    """What a group of heads has of one row's n tokens, each at its position.

    Args:
        q: `[Hq, n, D]`, not rotated.
        k: `[Hkv, n, D]`, not rotated, as read back from where they are stored.
        v: `[Hkv, n, Dv]`, likewise.
        at: `[n, n]`, at which position each query may read each key, -1 where it may not.
        spans: the calls.
        far: largest distance at which a key is read, or None.
        turn: the layer's rotation.
        logits: from products to weights.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    at: Tensor
    spans: Sequence[Span]
    far: int | None
    turn: Turn
    logits: Logits

    @property
    def per_kv(self) -> int:
        """Query heads of a KV head."""
        return len(self.q) // len(self.k)

    @cached_property
    def q_in_text(self) -> Tensor:
        """`[Hq, n, D]`, queries rotated at their place in the text."""
        return self.turn(self.q, torch.arange(self.q.shape[1]).expand(len(self.q), -1))

    @cached_property
    def k_in_text(self) -> Tensor:
        """`[Hkv, n, D]`, keys rotated at their place in the text."""
        return self.turn(self.k, torch.arange(self.k.shape[1]).expand(len(self.k), -1))

    def weights(self, head: int, first: int, last: int, reads: Tensor) -> Tensor:
        """What queries `first` to `last` of one KV head give to each key; reads, result: `[G, queries, n]`."""
        at = self.at[first : last + 1].clamp(min=0)
        q = self.q[head * self.per_kv : (head + 1) * self.per_kv, first : last + 1]
        own = at.diagonal(first).expand(len(q), -1)
        keys = self.turn(self.k[head].expand(len(at), -1, -1), at)  # a set of keys for every query: [queries, n, D]
        x = torch.einsum("gtd,tsd->gts", self.turn(q, own), keys) * self.logits.scale
        if self.logits.softcap is not None:
            x = self.logits.softcap * torch.tanh(x / self.logits.softcap)
        x = x.masked_fill(~reads, float("-inf"))
        if self.logits.sinks is not None:
            sinks = self.logits.sinks[head * self.per_kv : (head + 1) * self.per_kv, None, None].to(x.dtype)
            x = torch.cat((x, sinks.expand(-1, len(at), 1)), -1)
        return x.softmax(-1).nan_to_num()[..., : at.shape[1]]
