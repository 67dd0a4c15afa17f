"""Which blocks of keys a block of queries reads, and how long a choice is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..plan import Selector
from .scene import Scene
from .scores import score


def forced_blocks(selector: Selector, first: int, last: int) -> set[int]:
    """Blocks that queries at positions `first` to `last` read in any case: those with sinks and those near them."""
    lowest, own = max(0, first - selector.local + 1) // selector.block, last // selector.block
    lowest = 0 if last < selector.dense_below else lowest
    sinks = -(-selector.sink // selector.block)
    return {j for j in range(own + 1) if j < sinks or j >= lowest}


def pick_blocks(selector: Selector, scores: Sequence[float], forced: set[int], tau: float | None = None) -> set[int]:
    """Blocks that a budget takes beside the forced ones: the best first, of equal scores the one that comes first.

    Args:
        selector: says how many.
        scores: of every block up to the queries' own; those of forced blocks count for a share of mass only.
        forced: not taken.
        tau: the share; None: the budget is a fixed number of blocks.
    """
    ranked = sorted((j for j in range(len(scores)) if j not in forced), key=lambda j: -scores[j])
    if tau is None:
        return set(ranked[: (selector.budget.tokens or 0) // selector.block])
    picked: set[int] = set()
    for j in ranked:
        if tau < 1 and sum(scores[i] for i in forced | picked) >= tau * sum(scores):
            break
        picked.add(j)
    return picked


class Choice:
    """The blocks that each query head of a scene reads: chosen afresh, or kept for some decode tokens."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._steps = 0  # decode tokens since the last prefill call
        self._kept: list[set[int]] = []  # of each query head, what was chosen last

    def forget(self) -> None:
        """A prefill call begins."""
        self._steps = 0

    def keys(self, selector: Selector, decode: bool, first: int, last: int, mass: Tensor) -> Tensor:
        """Keys in the blocks that queries `first` to `last` read, `[Hq, n]`, bool; mass: `[Hkv, n]`."""
        forced = forced_blocks(selector, first, last)
        if self._steps % selector.refresh_every == 0:
            self._kept = [forced | picked for picked in self._choose(selector, first, last, forced, mass)]
        self._steps += decode
        block_of = torch.arange(self._scene.q.shape[1]) // selector.block
        return torch.stack([torch.isin(block_of, torch.tensor(sorted(forced | kept))) for kept in self._kept])

    def _choose(self, selector: Selector, first: int, last: int, forced: set[int], mass: Tensor) -> list[set[int]]:
        """What is picked for each query head; heads that share a selection have the same."""
        scene, kind = self._scene, type(selector.scorer).__name__
        scores = score(selector, scene, first, last, mass)  # [Hq, M]
        sharing = {"q_head": 1, "kv_head": scene.per_kv, "all": len(scores)}[selector.share]
        together = scores.view(-1, sharing, scores.shape[1])
        shared = together.amax(1) if kind == "UpperBound" else together.mean(1)
        shares = getattr(selector.budget, "shares", None)  # of Mass: one for all heads, or one for each
        taus = [None] * len(shared) if shares is None else list(shares) * (len(shared) if len(shares) == 1 else 1)
        picks = [pick_blocks(selector, s, forced, t) for s, t in zip(shared.tolist(), taus, strict=True)]
        return [pick for pick in picks for _ in range(sharing)]
