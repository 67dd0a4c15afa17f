"""Which slot a token has, and which token a slot has: sinks have their own, and beyond them slots may go round."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where a token of each row is stored, beside `Store.memory`.

    Args:
        ring: slots that go round beyond the sinks; None: every token has a slot of its own.
        bounds: `[B, Hkv, M', 2, D]`, bounds of the keys, or None.
        sub: tokens of a sub-block.
    """

    ring: int | None
    bounds: Tensor | None
    sub: int


def slot_of(pos: Tensor, sink: int, ring: int | None) -> Tensor:
    """The slot of each position: its own, or beyond the sinks one of `ring` that go round."""
    return pos if ring is None else torch.where(pos < sink, pos, sink + (pos - sink) % ring)


def positions_in(lengths: Tensor, slots: int, sink: int, ring: int | None) -> Tensor:
    """Position in each of the first slots when rows are `lengths` long, -1 for none: `[B or 1, slots]`, int64."""
    pos = torch.arange(slots, device=lengths.device)[None]
    behind = lengths[:, None] - 1 - pos
    if ring is not None:
        pos = pos.repeat(len(lengths), 1) if len(lengths) > 1 else pos
        pos[:, sink:].add_(behind[:, sink:] // ring, alpha=ring)
    return pos.masked_fill(behind < 0, -1)
