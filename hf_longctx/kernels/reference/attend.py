"""Attention over what each query sees, block of queries by block of queries, in float32."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rotate import rotate

if TYPE_CHECKING:
    from ..ops import Logits, Turns, Visibility

LOGITS_PER_BLOCK = 1 << 23
"""Logits that one block of queries may hold at a time: 32 MiB in float32."""


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, logits: Logits, see: Visibility, turns: Turns | None) -> Tensor:
    """The definition of `ops.attend_blocks`."""
    return torch.cat(
        [
            attend_pages(q[:, :, rows], take_columns(k, columns), take_columns(v, columns), logits, part, part_turns)
            for rows, columns, part, part_turns in blocks(q, k, see, turns)
        ],
        2,
    )


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
    for first in range(0, tokens, size):
        last = min(first + size, tokens)
        high = stored - tokens + last
        low = 0 if see.window is None else max(0, stored - tokens + first - see.window + 1)
        columns = (slice(0, high),) if low <= sinks else (slice(0, sinks), slice(low, high))
        rows = slice(first, last)
        part = replace(see, q_pos=q_pos[:, rows], k_pos=torch.cat([k_pos[:, c] for c in columns], 1))
        yield rows, columns, part, turns and replace(turns, sink_pos=turns.sink_pos[:, rows])


def take_columns(x: Tensor, columns: tuple[slice, ...]) -> Tensor:
    """Some ranges of the columns of `[B, H, S, D]`; a view if there is but one."""
    return x[:, :, columns[0]] if len(columns) == 1 else torch.cat([x[:, :, c] for c in columns], 2)


def positions(see: Visibility, tokens: int, stored: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of queries `[B or 1, T]` and of key columns `[B or 1, S]`."""
    k_pos = torch.arange(stored, device=device)[None] if see.k_pos is None else see.k_pos
    q_pos = torch.arange(stored - tokens, stored, device=device)[None] if see.q_pos is None else see.q_pos
    return q_pos, k_pos


def visible(see: Visibility, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Which key each query sees: `[B or 1, T, S]`, bool."""
    distance = q_pos[:, :, None] - k_pos[:, None, :]
    seen = (distance >= 0) & (k_pos >= 0)[:, None, :]
    if see.window is not None:
        seen &= (distance < see.window) | (k_pos < see.sink)[:, None, :]
    return seen


def attend_pages(q: Tensor, k: Tensor, v: Tensor, logits: Logits, see: Visibility, turns: Turns | None) -> Tensor:
    """The definition of `ops.attend_pages`: one softmax over all key columns."""
    work = torch.promote_types(q.dtype, torch.float32)
    q_pos, k_pos = positions(see, q.shape[2], k.shape[2], q.device)
    x = products(q, k, work)
    if turns is not None and turns.inv_freq is not None:
        x = _turned(x, q, k, q_pos, k_pos, see.sink, turns)
    x = x * logits.scale
    if logits.softcap is not None:
        x = logits.softcap * torch.tanh(x / logits.softcap)
    if logits.slopes is not None:
        x = x + logits.slopes.to(x)[None, :, None, None] * _distance(q_pos, k_pos, see.sink, turns).to(x)[:, None]
    x = x.masked_fill(~visible(see, q_pos, k_pos)[:, None], float("-inf"))
    weights = _softmax(x, logits.sink_logits).reshape(k.shape[0], k.shape[1], -1, k.shape[2])
    return (weights @ v.to(work)).view(*q.shape[:3], v.shape[-1]).to(q.dtype)


def products(q: Tensor, k: Tensor, work: torch.dtype) -> Tensor:
    """Query-key products, the G query heads of a KV head side by side: `[B, Hq, T, S]`."""
    grouped = q.to(work).reshape(q.shape[0], k.shape[1], -1, q.shape[3]) @ k.to(work).transpose(2, 3)
    return grouped.view(*q.shape[:3], k.shape[2])


def _turned(x: Tensor, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, sink: int, turns: Turns) -> Tensor:
    """Replace the products whose key stands at another lap or is a sink."""
    work, inv_freq = x.dtype, turns.inv_freq
    assert inv_freq is not None
    q = q.to(work)  # turned in float32: one rounding less
    q_lap, k_lap = ((pos - turns.offset).clamp(min=0) // turns.lap for pos in (q_pos, k_pos))
    before = rotate(q, torch.full_like(q_pos, turns.lap), inv_freq, turns.interleaved)
    x = torch.where((q_lap[:, :, None] > k_lap[:, None, :])[:, None], products(before, k, work), x)
    sinks = min(sink, k.shape[2])
    if not sinks:
        return x
    far = rotate(q, turns.sink_pos - (q_pos - turns.lap * q_lap), inv_freq, turns.interleaved)
    head = torch.where((k_pos[:, :sinks] < sink)[:, None, None], products(far, k[:, :, :sinks], work), x[..., :sinks])
    return torch.cat((head, x[..., sinks:]), -1)


def _distance(q_pos: Tensor, k_pos: Tensor, sink: int, turns: Turns | None) -> Tensor:
    """Key position minus query position, as the query reads it: `[B or 1, T, S]`."""
    near = k_pos[:, None, :] - q_pos[:, :, None]
    if turns is None:
        return near
    return torch.where((k_pos < sink)[:, None, :], k_pos[:, None, :] - turns.sink_pos[:, :, None], near)


def _softmax(x: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Softmax over the last axis; zeros where all is -inf; a sink logit takes its share and has no value."""
    top = x.amax(-1, keepdim=True)
    if sink_logits is not None:
        sinks = sink_logits.to(x)[None, :, None, None]
        top = torch.maximum(top, sinks)
    top = top.masked_fill(top == float("-inf"), 0.0).detach()
    weights = torch.exp(x - top)
    total = weights.sum(-1, keepdim=True)
    if sink_logits is not None:
        total = total + torch.exp(sinks - top)
    return weights / total.masked_fill(total == 0, 1.0)
