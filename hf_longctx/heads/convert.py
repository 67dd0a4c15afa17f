"""From scores of query heads to gates of KV heads, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from .pattern import HeadPattern, message
from .scores import HeadScores

_REDUCE: Mapping[str, Callable[[Sequence[float]], float]] = {"max": max, "mean": fmean}


def to_pattern(scores: HeadScores, kv_heads: int, reduce: str = "max") -> HeadPattern:
    """Gates of KV heads: each has the largest mean score of the query heads that read it.

    Args:
        scores: of all query heads.
        kv_heads: of each layer.
        reduce: `max`, as one retrieval head is reason enough to keep the keys, or `mean`.

    Returns:
        A pattern with the usual sinks and window; where `code` scores exceed 1, gates are 1.

    Raises:
        ValueError: query heads that are not a multiple of the KV heads, a layer that is missing, or no such reduction.
    """
    if reduce not in _REDUCE:
        raise ValueError(message("reduce", f"one of {', '.join(_REDUCE)}", repr(reduce), "Use max"))
    rows: list[list[float]] = []
    for (layer, head), mean in scores.means.items():
        if layer > len(rows) or (layer == len(rows) and head) or (layer < len(rows) and head != len(rows[layer])):
            advice = "Find scores of all heads"
            raise ValueError(message(scores.source, "scores of every head of every layer", f"{layer}-{head}", advice))
        if layer == len(rows):
            rows.append([])
        rows[layer].append(mean)
    gates = []
    for layer, row in enumerate(rows):
        if kv_heads < 1 or len(row) % kv_heads:
            where, advice = f"{scores.source}, layer {layer}", "Pass the KV heads of this very model"
            raise ValueError(message(where, f"query heads in {kv_heads} equal groups", f"{len(row)}", advice))
        size = len(row) // kv_heads
        gates.append(tuple(min(1.0, _REDUCE[reduce](row[i : i + size])) for i in range(0, len(row), size)))
    return HeadPattern(scores.name, tuple(gates), source=scores.source)


def to_scores(pattern: HeadPattern, q_heads: int) -> HeadScores:
    """Scores of query heads, one trial: each has the gate of the KV head that it reads, exactly.

    Args:
        pattern: the gates.
        q_heads: query heads of each layer.

    Raises:
        ValueError: not a multiple of the KV heads.
    """
    found = {}
    for layer, row in enumerate(pattern.gates):
        if q_heads < len(row) or q_heads % len(row):
            where, advice = (
                f"{pattern.source or pattern.name}, layer {layer}",
                "Pass the query heads of this very model",
            )
            raise ValueError(message(where, f"a multiple of {len(row)} query heads", f"{q_heads}", advice))
        found.update({(layer, head): (row[head * len(row) // q_heads],) for head in range(q_heads)})
    return HeadScores(found, pattern.name, pattern.source or pattern.name)
