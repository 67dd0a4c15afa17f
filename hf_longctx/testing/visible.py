"""What every query may see before blocks are selected, and how a row's tokens are spread over calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import HeadPolicy, Plan

FEW = 8
"""Columns of a call beyond which it is never a decode call."""


@dataclass(frozen=True)
class Span:
    """The tokens of one row in one call: positions `first` to `last`."""

    first: int
    last: int
    decode: bool


def spans(calls: Sequence[int], real: Tensor | None = None) -> list[Span]:
    """The calls that hold tokens of a row; arguments as `key_positions`."""
    out: list[Span] = []
    start = tokens = 0
    for columns in calls:
        count = columns if real is None else int(real[start : start + columns].bool().sum())
        if count:
            out.append(Span(tokens, tokens + count - 1, start > 0 and columns <= FEW))
        start, tokens = start + columns, tokens + count
    return out


def key_positions(
    policy: HeadPolicy,
    calls: Sequence[int],
    real: Tensor | None = None,
    rooms: Mapping[int, int] | None = None,
) -> Tensor:
    """At which position each query may read each key of one row, for one policy; selectors then pick among the keys.

    Args:
        policy: what the head does.
        calls: columns of each call of the model, in order; together C.
        real: `[C]`, nonzero for real tokens; None: all are.
        rooms: `{i: n}` stands for `evict(cache, room=n)` before call `i`.

    Returns:
        `[C, C]`, int64: query column, key column; -1 where the key is not seen; on the diagonal the query itself.
    """
    keep, sink = policy.retention, policy.retention.sink
    in_cache, far = policy.positions.in_cache, policy.positions.distance
    total = sum(calls)
    out = torch.full((total, total), -1, dtype=torch.int64)
    index: dict[int, int] = {}  # of a column's token in its row
    held: list[int] = []  # columns whose tokens are stored
    start = 0
    for number, columns in enumerate(calls):
        if in_cache and rooms and number in rooms:
            assert keep.window is not None
            held = _kept(held, index, sink, keep.window - rooms[number])
        fresh = [c for c in range(start, start + columns) if real is None or bool(real[c])]
        index.update({c: len(index) + i for i, c in enumerate(fresh)})
        reach = keep.reach(start == 0 or columns > FEW)
        for query in fresh:
            seen = _kept([c for c in held + fresh if c <= query], index, sink, reach)
            edge = 0 if far is None else index[query] - far
            places = range(len(seen)) if in_cache else [max(index[c], edge) for c in seen]
            out[query, seen] = torch.tensor(list(places))
        held = _kept(held + fresh, index, sink, reach)
        start += columns
    return out


def _kept(columns: list[int], index: Mapping[int, int], sink: int, window: int | None) -> list[int]:
    """Those among `columns` that are sinks or among the last `window` tokens of the row, up to the last of `index`."""
    last = max((index[c] for c in columns), default=0)
    return [c for c in columns if window is None or index[c] < sink or last - index[c] < window]


def masks(
    plan: Plan, calls: Sequence[int], real: Tensor | None = None, rooms: Mapping[int, int] | None = None
) -> list[Tensor]:
    """Which key each query of one row may see, selectors aside; arguments as `key_positions`.

    Returns:
        Per layer `[Hkv, C, C]`, bool.
    """
    out = []
    for layer in plan.layers:
        seen = torch.zeros(layer.kv_heads, sum(calls), sum(calls), dtype=torch.bool)
        for group in layer.groups:
            seen[list(group.kv_heads)] = key_positions(group.policy, calls, real, rooms) >= 0
        out.append(seen)
    return out
