"""Attention over what each query sees, block of queries by block of queries, in float32."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rotate import rotate

if TYPE_CHECKING:
    from ..types import Logits, Selection, Turns, Visibility

LOGITS_PER_BLOCK = 1 << 22
"""Logits that one block of queries may hold at a time: 16 MiB in float32."""


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> Tensor:
    """The definition of `ops.attend_blocks`."""
    parts = (
        (
            rows,
            _attend_block(q[:, :, rows], take_columns(k, cols), take_columns(v, cols), logits, part, part_turns),
        )
        for rows, cols, part, part_turns in blocks(q, k, see, turns)
    )
    return join(parts, empty_out(q, v))


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """`[B, Hq, T, Dv]`, laid out as `[B, T, Hq, Dv]`, in which transformers wants it."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)


def join(parts: Iterable[tuple[slice, Tensor]], out: Tensor) -> Tensor:
    """Put blocks of queries into `out` `[B, Hq, T, Dv]`; a new tensor where gradients are wanted.

    `out` exists before the first block: results kept between the blocks' large temporaries would keep the allocator
    from using the same memory again.
    """
    if torch.is_grad_enabled():
        return torch.cat([part for _, part in parts], 2)
    for rows, part in parts:
        out[:, :, rows] = part
    return out


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


def attend_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> Tensor:
    """The definition of `ops.attend_pages`: queries are turned to the keys, which stay as they are."""
    q_pos, k_pos = positions(see, q.shape[2], k.shape[2], q.device)
    x = products(q, k, logits)
    if turns is not None and turns.inv_freq is not None:
        before = _turn(q, torch.full_like(q_pos, turns.lap), turns)
        earlier = turns.laps(q_pos)[:, :, None] > turns.laps(k_pos)[:, None, :]
        x = torch.where(earlier[:, None], products(before, k, logits), x)
    return _weigh(x, q, k, v, logits, see, turns, q_pos, k_pos)


def _attend_block(q: Tensor, k: Tensor, v: Tensor, logits: Logits, see: Visibility, turns: Turns | None) -> Tensor:
    """The same for a block of many queries: queries and keys are turned to the lap of the block's first query."""
    q_pos, k_pos = positions(see, q.shape[2], k.shape[2], q.device)
    if turns is None or turns.inv_freq is None:
        x = products(q, k, logits)
    else:
        base = turns.laps(q_pos[:, :1])
        x = products(
            _turn(q, (turns.laps(q_pos) - base) * turns.lap, turns),
            _turn(k, (turns.laps(k_pos) - base) * turns.lap, turns),
            logits,
        )
    return _weigh(x, q, k, v, logits, see, turns, q_pos, k_pos)


def products(q: Tensor, k: Tensor, logits: Logits) -> Tensor:
    """Scaled query-key products, the G query heads of a KV head side by side: `[B, Hq, T, S]`, float32 or better."""
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = (q.to(work) * logits.scale).reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return (grouped @ k.to(work).transpose(2, 3)).view(*q.shape[:3], k.shape[2])


def _turn(x: Tensor, delta: Tensor, turns: Turns) -> Tensor:
    assert turns.inv_freq is not None
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # one rounding less
    return rotate(x, delta, turns.inv_freq, turns.interleaved)


def _weigh(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    q_pos: Tensor,
    k_pos: Tensor,
) -> Tensor:
    """From products to attention: sinks, softcap, bias, one softmax over what is visible, values."""
    sinks = min(see.sink, k.shape[2])
    if turns is not None and turns.inv_freq is not None and sinks:
        far = _turn(q, turns.sink_pos - (q_pos - turns.lap * turns.laps(q_pos)), turns)
        is_sink = (k_pos[:, :sinks] < see.sink)[:, None, None]
        x[..., :sinks] = torch.where(is_sink, products(far, k[:, :, :sinks], logits), x[..., :sinks])
    if logits.softcap is not None:
        x = logits.softcap * torch.tanh(x / logits.softcap)
    if logits.slopes is not None:
        x = x + logits.slopes.to(x)[None, :, None, None] * _distance(q_pos, k_pos, see.sink, turns).to(x)[:, None]
    x = x.masked_fill_(~visible(see, q_pos, k_pos)[:, None], float("-inf"))
    weights, total = _softmax(x, logits.sink_logits)
    out = weights.view(k.shape[0], k.shape[1], -1, k.shape[2]) @ v.to(x.dtype)
    return (out.view(*q.shape[:3], v.shape[-1]) / total).to(q.dtype)


def _distance(q_pos: Tensor, k_pos: Tensor, sink: int, turns: Turns | None) -> Tensor:
    """Key position minus query position, as the query reads it: `[B or 1, T, S]`."""
    near = k_pos[:, None, :] - q_pos[:, :, None]
    if turns is None:
        return near
    return torch.where((k_pos < sink)[:, None, :], k_pos[:, None, :] - turns.sink_pos[:, :, None], near)


def _softmax(x: Tensor, sink_logits: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights over the last axis before division, and what to divide by; a sink logit has a share and no value."""
    top = x.detach().amax(-1, keepdim=True)
    sinks = None if sink_logits is None else sink_logits.to(x)[None, :, None, None]
    if sinks is not None:
        top = torch.maximum(top, sinks.detach())
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = x.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    return weights, total.masked_fill(total == 0, 1.0)
