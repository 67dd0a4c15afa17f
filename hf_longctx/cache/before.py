"""What a ring holds for the queries of a call of several tokens, copied before the call's own overwrite some of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import ops
from .place import slot_of
from .rows import Rows, View
from .step import Step


@dataclass(frozen=True)
class Before:
    """Keys and values of a ring before a call.

    Args:
        step: the call.
        first: `[1, n]`, int64, positions of the sinks that there are after the call.
        rest: `[B or 1, w]`, int64, positions of the window's tokens, right-aligned, -1 where there is none.
        k: sinks `[B, H, n, D]` as far as they are stored, and the window's `[B, H, w, D]`.
        v: likewise.
    """

    step: Step
    first: Tensor
    rest: Tensor
    k: tuple[Tensor, Tensor]
    v: tuple[Tensor, Tensor]

    @staticmethod
    def of(keys: Rows, values: Rows, step: Step, sink: int, ring: int) -> Before:
        """What stores hold before the call `step`, with `sink` tokens of slots of their own, and `ring` going round."""
        rows = keys.filled.shape[0]
        first = torch.arange(min(sink, step.columns + step.tokens), device=step.device)[None]
        width = min(ring, max(0, step.columns - sink))
        rest = step.lengths[:, None] - width + torch.arange(width, device=step.device)
        rest = torch.where(rest >= sink, rest, -1)
        index = slot_of(rest.clamp(min=0), sink, ring).expand(rows, -1)
        sinks = first.clamp(max=keys.slots - 1).expand(rows, -1)
        k, v = ((x.take(sinks), x.take(index)) for x in (keys, values))
        return Before(step, first, rest, k, v)

    def then(self, k: Tensor, v: Tensor, sink: int) -> View:
        """Sinks, then the window's tokens, then the call's own: arguments as `Store.append`, as they are stored."""
        step, first, lengths = self.step, self.first, self.step.lengths[:, None]
        old = first < lengths  # a row that was all padding so far brings its sinks along with this call
        own = (first - lengths).clamp(0, step.tokens - 1).expand(k.shape[0], -1)
        keys, values = (
            torch.cat((torch.where(old[:, None, :, None], sinks, ops.take_tokens(x, own)), rest, x), 2)
            for x, (sinks, rest) in ((k, self.k), (v, self.v))
        )
        last = torch.where(first < step.lengths_after[:, None], first, -1)
        parts = [last, self.rest, torch.where(step.pos >= sink, step.pos, -1)]
        rows = max(part.shape[0] for part in parts)
        return View(keys, values, torch.cat([part.expand(rows, -1) for part in parts], 1))
