"""From scores to the blocks that are read."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .weigh import LOGITS_PER_BLOCK


def pick_blocks(
    scores: Tensor,
    low: Tensor,
    high: Tensor,
    sink: int,
    take: int | None,
    tau: Tensor | None,
    forced: int,
) -> Tensor:
    """The definition of `ops.pick_blocks`."""
    rows, heads, count, blocks = scores.shape
    most = blocks if take is None else min(blocks, sink + forced + take)
    out = torch.empty(rows, heads, count, most, dtype=torch.int32, device=scores.device)
    size = max(1, LOGITS_PER_BLOCK // max(1, rows * heads * blocks))
    for first in range(0, count, size):
        part = slice(first, first + size)
        picked = _picked(scores[:, :, part], low[:, None, part, None], high[:, None, part, None], sink, take, tau)
        out[:, :, part] = _places(picked, most)
    return out


def _picked(scores: Tensor, low: Tensor, high: Tensor, sink: int, take: int | None, tau: Tensor | None) -> Tensor:
    """Which blocks are picked, bool like `scores`; low and high: `[B or 1, 1, N, 1]`."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores.masked_fill(scores.isnan(), float("-inf"))
    j = torch.arange(scores.shape[-1], device=scores.device)
    forced = ((j < sink) | (j >= low)) & (j <= high)
    candidate = (~forced & (j <= high)).expand_as(scores)
    order = scores.sort(dim=-1, descending=True, stable=True).indices  # topk has no order among equal scores
    ranked = candidate.gather(-1, order)
    if take is not None:
        best = ranked & (ranked.cumsum(-1) <= take)
    else:
        assert tau is not None
        share = tau.to(scores).view(1, -1, 1, 1)
        total = scores.masked_fill(j > high, 0.0).sum(-1, keepdim=True)
        held = scores.masked_fill(~forced, 0.0).sum(-1, keepdim=True)
        own = scores.gather(-1, order).masked_fill_(~ranked, 0.0)
        before = held + pad(own.cumsum(-1)[..., :-1], (1, 0))
        best = ranked & ((before < share * total) | (share >= 1))
    return forced | torch.zeros_like(candidate).scatter_(-1, order, best)


def _places(picked: Tensor, most: int) -> Tensor:
    """Where it is True, ascending, then -1: `[..., most]`, int32."""
    place = (picked.cumsum(-1) - 1).clamp_(max=most).masked_fill_(~picked, most)  # the last one is thrown away
    j = torch.arange(picked.shape[-1], dtype=torch.int32, device=picked.device)
    out = torch.full((*picked.shape[:-1], most + 1), -1, dtype=torch.int32, device=picked.device)
    return out.scatter_(-1, place, j.expand_as(place))[..., :most]
