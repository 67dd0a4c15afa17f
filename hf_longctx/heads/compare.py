"""Do two rankings of heads agree, and which other heads are a fair comparison?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from .pattern import message
from .scores import Head, HeadScores


def spearman(first: Mapping[Head, float], second: Mapping[Head, float]) -> float:
    """Rank correlation over all heads, from -1 to 1; equal values share the mean of their ranks.

    Raises:
        ValueError: they do not speak of the same heads.
    """
    a, b = (_ranks(np.array([each[head] for head in sorted(first)])) for each in _same(first, second))
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / norm if norm else float("nan")


def stability(scores: HeadScores, splits: int = 20) -> float | None:
    """Mean of `spearman` between two halves of the trials, over random splits; None where nothing can be ranked."""
    if scores.count < 2:
        return None
    found = [spearman(*(half.means for half in scores.halves(seed))) for seed in range(splits)]
    return None if any(map(math.isnan, found)) else fmean(found)


def overlap(first: Mapping[Head, float], second: Mapping[Head, float], top: int) -> float:
    """Share of the `top` heads of one that are among the `top` heads of the other.

    Raises:
        ValueError: they do not speak of the same heads, or have not so many.
    """
    _same(first, second)
    if not 1 <= top <= len(first):
        raise ValueError(message("top", f"1 to {len(first)} heads", f"{top}", "Compare fewer"))
    best = [set(sorted(each, key=lambda head: (-each[head], head))[:top]) for each in (first, second)]
    return len(best[0] & best[1]) / top


def layer_matched(chosen: Iterable[Head], q_heads: Sequence[int], seed: int) -> list[Head]:
    """As many other heads, drawn at random from the same layers; from the nearest ones where a layer has too few.

    Args:
        chosen: heads that are not drawn.
        q_heads: query heads of each layer.
        seed: of the draw.

    Raises:
        ValueError: half of all heads and more are chosen.
    """
    taken, draw = set(chosen), Random(seed)
    free = [[(layer, h) for h in range(count) if (layer, h) not in taken] for layer, count in enumerate(q_heads)]
    if sum(map(len, free)) < len(taken):
        raise ValueError(message("random heads", f"{len(taken)} that are not chosen", "too few", "Choose fewer heads"))
    for heads in free:
        draw.shuffle(heads)
    found = []
    wanted = Counter(layer for layer, _ in taken)
    for layer in sorted(wanted):  # first everyone takes from the own layer
        count = min(wanted[layer], len(free[layer]))
        found += [free[layer].pop() for _ in range(count)]
        wanted[layer] -= count
    for layer in sorted(wanted.elements()):
        near = min((n for n, heads in enumerate(free) if heads), key=lambda n: (abs(n - layer), n))
        found.append(free[near].pop())
    return sorted(found)


def _same(first: Mapping[Head, float], second: Mapping[Head, float]) -> tuple[Mapping[Head, float], ...]:
    if first.keys() != second.keys():
        sizes = f"{len(first)} and {len(second)}, of which {len(first.keys() & second.keys())} are in both"
        raise ValueError(message("heads", "two files of one model", sizes, "Compare files of the same model"))
    return first, second


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = count.cumsum()
    ranks: NDArray[np.float64] = (ends - (count - 1) / 2)[place]
    return ranks
