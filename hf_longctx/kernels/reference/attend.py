"""Attention over what each query sees, block of queries by block of queries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..types import Packed
from .kv import decode_kv
from .selected import attend_selected
from .weigh import LOGITS_PER_BLOCK, average, empty_out, join, positions, turn_keys, weigh

if TYPE_CHECKING:
    from ..types import Logits, Selection, Turns, Visibility


def attend_blocks(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> Tensor:
    """The definition of `ops.attend_blocks`."""
    if selection is not None:
        return attend_selected(q, k, v, logits, see, turns, selection)
    k, v = values_of(k), values_of(v)
    parts = (
        (rows, _attend(q[:, :, rows], take_columns(k, cols), take_columns(v, cols), logits, part, part_turns, False))
        for rows, cols, part, part_turns in blocks(q, k, see, turns)
    )
    return join(parts, empty_out(q, v.shape[3]))


def attend_pages(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> Tensor:
    """The definition of `ops.attend_pages`: queries are turned to the keys, which stay as they are where they can."""
    if selection is not None:
        return attend_selected(q, k, v, logits, see, turns, selection)
    return _attend(q, values_of(k), values_of(v), logits, see, turns, True)


def values_of(x: Tensor | Packed) -> Tensor:
    """What was stored."""
    return decode_kv(x) if isinstance(x, Packed) else x


def _attend(q: Tensor, k: Tensor, v: Tensor, logits: Logits, see: Visibility, turns: Turns | None, few: bool) -> Tensor:
    q_pos, k_pos = (pos[:, None] for pos in positions(see, q.shape[2], k.shape[2], q.device))
    keys = turn_keys(k, k_pos, q_pos, see, turns, few)
    return average(*weigh(q, q_pos, keys, logits, see, turns), v, q.dtype)


def blocks(
    q: Tensor, k: Tensor, see: Visibility, turns: Turns | None
) -> Iterator[tuple[slice, tuple[slice, ...], Visibility, Turns | None]]:
    """Blocks of queries with the key columns that they may see: the sinks and one band.

    Yields:
        Query rows, one or two column ranges in ascending order, and the visibility and turns of just these.
    """
    tokens, stored = q.shape[2], k.shape[2]
    q_pos, k_pos = positions(see, tokens, stored, q.device)
    sinks = min(see.sink, stored)
    width = stored if see.window is None else min(stored, see.sink + see.window)
    size = max(16, min(512, LOGITS_PER_BLOCK // max(1, q.shape[0] * q.shape[1] * width)) // 16 * 16)
    starts = range(0, tokens, size)
    for first, oldest in zip(starts, _oldest(see, q_pos, stored, starts), strict=True):
        last = min(first + size, tokens)
        high = stored - tokens + last
        low = min(max(0, oldest), high - 1)
        columns = (slice(0, high),) if low <= sinks else (slice(0, sinks), slice(low, high))
        rows = slice(first, last)
        part = replace(see, q_pos=q_pos[:, rows], k_pos=torch.cat([k_pos[:, c] for c in columns], 1))
        yield rows, columns, part, turns and replace(turns, sink_pos=turns.sink_pos[:, rows])


def _oldest(see: Visibility, q_pos: Tensor, stored: int, starts: range) -> list[int]:
    """The first column in the window of any query of each block; it may be less than 0."""
    if see.window is None:
        return [0] * len(starts)
    if see.q_pos is None or see.k_pos is not None:  # the last query stands at the last column
        firsts = [stored - q_pos.shape[1] + start for start in starts]
    else:  # columns are positions, and each row ends where it likes
        present = q_pos.masked_fill(q_pos < 0, stored)
        firsts = torch.stack([part.amin() for part in torch.split(present, starts.step, 1)]).tolist()
    return [first - see.window + 1 for first in firsts]


def take_columns(x: Tensor, columns: tuple[slice, ...]) -> Tensor:
    """Some ranges of the columns of `[B, H, S, D]`; a view if there is but one."""
    return x[:, :, columns[0]] if len(columns) == 1 else torch.cat([x[:, :, c] for c in columns], 2)
