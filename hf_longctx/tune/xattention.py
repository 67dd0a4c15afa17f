"""Thresholds of XAttention: what each costs and misses, and which ones to take. Arrays only; no model here.

A query head reads, for each block of queries, the first block of keys, its own, and of the others the best-scored until
they hold a share tau of the scores. So each block between has a critical value, the share that those before it hold,
and is read if and only if tau is larger. Sorted by it, the blocks say for every tau at once, and exactly, how many are
read and how much true attention is missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

START = 0.9
GRID: Floats = np.array([1.0, *START ** np.arange(1, 45)])
"""Thresholds that `fewest_blocks` chooses from: all, 0.9, and so on by a factor of 0.9 down to 0.01."""


@dataclass(frozen=True)
class Curve:
    """What a query head reads and misses at every threshold.

    Args:
        critical: `[n]`, ascending, one for each block that is not read in any case; read where tau is larger.
        missed: `[n + 1]`, true attention in the blocks from the i-th on.
        forced: blocks that are read in any case.
        total: true attention in all blocks.
    """

    critical: Floats
    missed: Floats
    forced: int
    total: float

    @property
    def blocks(self) -> int:
        """All that causal attention reads."""
        return self.forced + len(self.critical)

    def read(self, tau: Any) -> Any:
        """Blocks that are read at a threshold, or at each of several."""
        return self.forced + self._beyond(tau)

    def lost(self, tau: Any) -> Any:
        """True attention in the blocks that are not read at a threshold, or at each of several."""
        return self.missed[self._beyond(tau)]

    def _beyond(self, tau: Any) -> Any:
        """How many critical values lie below a threshold; at 1 all, whatever rounding says."""
        return np.where(np.asarray(tau) >= 1, len(self.critical), np.searchsorted(self.critical, tau, side="left"))


def curves(mass: Floats, score: Floats) -> list[Curve]:
    """A curve for each query head of a layer, of one text.

    Args:
        mass: `[Hq, N, N]`, true attention of each block of queries to each block of keys.
        score: `[Hq, N, N]`, what the antidiagonals say.
    """
    heads, blocks = mass.shape[:2]
    critical, between = [np.zeros((heads, 0))], [np.zeros((heads, 0))]
    for n in range(2, blocks):
        order = np.argsort(-score[:, n, 1:n], axis=1, kind="stable")
        ranked = np.take_along_axis(score[:, n, 1:n], order, 1)
        before = np.concatenate((score[:, n, :1] + score[:, n, n : n + 1], ranked[:, :-1]), 1).cumsum(1)
        critical.append(before / score[:, n, : n + 1].sum(1, keepdims=True))
        between.append(np.take_along_axis(mass[:, n, 1:n], order, 1))
    total = np.tril(mass).sum((1, 2))
    every = zip(np.concatenate(critical, 1), np.concatenate(between, 1), total, strict=True)
    return [_curve(c, m, 2 * blocks - 1, float(t)) for c, m, t in every]


def joined(parts: Sequence[Curve]) -> Curve:
    """One curve of the same head on several texts."""
    mass = np.concatenate([part.missed[:-1] - part.missed[1:] for part in parts])
    critical = np.concatenate([part.critical for part in parts])
    return _curve(critical, mass, sum(part.forced for part in parts), sum(part.total for part in parts))


def _curve(critical: Floats, mass: Floats, forced: int, total: float) -> Curve:
    order = np.argsort(critical, kind="stable")
    missed = np.concatenate((mass[order][::-1].cumsum()[::-1], [0.0]))
    return Curve(critical[order], missed, forced, total)


def at_coverage(mass: Floats, score: Floats, coverage: float) -> Floats:
    """The share of the scores that blocks have which score as well as all those that matter.

    Those that matter are the fewest blocks of the head that hold `coverage` of its true attention. This is how the
    authors' code of XAttention (arXiv:2503.16428) profiles a head; over several texts it takes the maximum.

    Args:
        mass: `[Hq, N, N]`, as in `curves`.
        score: `[Hq, N, N]`, likewise.
        coverage: in (0, 1].

    Returns:
        `[Hq]`, in (0, 1].
    """
    seen = np.tril_indices(mass.shape[1])
    mass, score = mass[:, seen[0], seen[1]], score[:, seen[0], seen[1]]
    order = np.argsort(-mass, axis=1, kind="stable")
    before = np.take_along_axis(mass, order, 1).cumsum(1) - np.take_along_axis(mass, order, 1)
    matters = before < coverage * mass.sum(1, keepdims=True)
    lowest = np.where(matters, np.take_along_axis(score, order, 1), np.inf).min(1, keepdims=True)
    shares: Floats = np.where(score >= lowest, score, 0.0).sum(1) / score.sum(1)
    return np.clip(shares, np.finfo(np.float64).tiny, 1.0)


def fewest_blocks(heads: Sequence[Curve], coverage: float, steps: int) -> Floats:
    """The thresholds at which all heads together read fewest blocks and hold `coverage` of their true attention.

    Paper: XAttention (arXiv:2503.16428) §2.3, a dynamic programme over heads in order and M = 1000 adjustments, each of
    which multiplies a head's threshold by 0.9, from 0.9 on. Its code was not released, and its performance is that of
    the model on a task. Here performance is measured on the heads themselves: `D[h][m]` is the fewest blocks that the
    first h heads can read while they miss at most m shares of the true attention that all may miss, which is divided
    into M. A number of adjustments says nothing about what they save; what they miss adds up over heads. A head's
    thresholds are those of the paper, and 1, so that there always is a solution. What a head misses is rounded up to
    whole shares, so that coverage is kept; with ten times as many shares as heads this costs a tenth of what may be
    missed at most.

    Args:
        heads: a curve for each.
        coverage: share of the true attention that is read, in (0, 1].
        steps: M.

    Returns:
        `[H]`, in (0, 1].
    """
    share = (1 - coverage) * sum(head.total for head in heads) / steps
    fewest = np.zeros(steps + 1, np.int64)
    taken = np.zeros((len(heads), steps + 1), np.int8)
    prices = [_prices(head, share, steps) for head in heads]
    for choice, head, price in zip(taken, heads, prices, strict=True):
        best = np.full(steps + 1, np.iinfo(np.int64).max)
        for k, (blocks, shares) in enumerate(zip(head.read(GRID), price, strict=True)):
            if shares > steps:
                break  # lower thresholds miss no less
            found, target = fewest[: steps + 1 - shares] + blocks, best[shares:]
            choice[shares:][found < target] = k
            np.minimum(target, found, out=target)
        fewest = best
    chosen, left = np.ones(len(heads)), steps
    for h in reversed(range(len(heads))):
        chosen[h] = GRID[taken[h, left]]
        left -= prices[h][taken[h, left]]
    return chosen


def _prices(head: Curve, share: float, steps: int) -> list[int]:
    """Shares that a head misses at each threshold of the grid, rounded up; more than all where it cannot be."""
    missed = head.lost(GRID)
    if share <= 0:
        return [0 if lost <= 0 else steps + 1 for lost in missed]
    return [int(shares) for shares in np.minimum(np.ceil(missed / share), steps + 1)]


def density(heads: Sequence[Curve], taus: Sequence[float] | Floats) -> float:
    """Share of all blocks that are read."""
    return float(sum(h.read(t) for h, t in zip(heads, taus, strict=True)) / sum(h.blocks for h in heads))


def covered(heads: Sequence[Curve], taus: Sequence[float] | Floats) -> float:
    """Share of the true attention that is read."""
    return float(1 - sum(h.lost(t) for h, t in zip(heads, taus, strict=True)) / sum(h.total for h in heads))
