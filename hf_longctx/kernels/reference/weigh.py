"""How some queries weigh the keys before them: products at the right angles, logits, one softmax, in float32."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rotate import rotate

if TYPE_CHECKING:
    from ..types import Logits, Turns, Visibility

LOGITS_PER_BLOCK = 1 << 22
"""Logits that one block of queries may hold at a time: 16 MiB in float32."""

_NEVER = 2**62
"""A position that no query reaches."""


@dataclass(frozen=True)
class Keys:
    """Keys as some queries read them: each where it is close to the query, the first ones also at another place.

    Args:
        near: `[B, H, S, D]`, H = Hkv or Hq.
        first: `[B, H, F, D]`, F <= S: the sinks as they are, or far keys at position 0; F = 0 where there are none.
        pos: `[B or 1, H or 1, S]`, int64, -1 for no key.
        lap: `[B or 1, 1, 1]`, int64, the lap at which `near` stands; None: each key at its own.
    """

    near: Tensor
    first: Tensor
    pos: Tensor
    lap: Tensor | None


def turn_keys(
    k: Tensor, pos: Tensor, q_pos: Tensor, see: Visibility, turns: Turns | None, few: bool, far: int | None = None
) -> Keys:
    """Keys for some queries.

    Args:
        k: `[B, H, S, D]`, at lap positions where there are turns.
        pos: `[B or 1, H or 1, S]`, int64.
        q_pos: `[B or 1, 1, T]`, int64.
        see: its sinks are read elsewhere where positions are not clamped.
        turns: None: products are right as they are.
        few: few queries: they will be turned to the keys, not both to one lap.
        far: keys, the first ones, that may be beyond the clamped distance; None: that is looked up.
    """
    if turns is None or turns.inv_freq is None:
        return Keys(k, k[:, :, :0], pos, None)
    laps = turns.laps(pos)
    if turns.clamp is None:
        first = k[:, :, : see.sink]
    else:
        if far is None:
            beyond = (pos >= 0) & (pos < q_pos.amax(-1, keepdim=True) - turns.clamp)
            places = torch.arange(1, pos.shape[-1] + 1, device=pos.device)
            far = int((beyond * places).amax())  # a wait for the device, and most keys are near
        first = _turn(k[:, :, :far], (turns.lap * laps - pos)[..., :far], turns)
    if few:
        return Keys(k, first, pos, None)
    lap = turns.laps(q_pos.amax(-1, keepdim=True))
    return Keys(_turn(k, (laps - lap) * turns.lap, turns), first, pos, lap)


def weigh(
    q: Tensor, q_pos: Tensor, keys: Keys, logits: Logits, see: Visibility, turns: Turns | None
) -> tuple[Tensor, Tensor]:
    """Weights of each key, `[B, H, G, T, S]`, before division, and what to divide by, `[B, H, G, T, 1]`.

    Args:
        q: `[B, Hq, T, D]`, at lap positions where there are turns; H * G = Hq.
        q_pos: `[B or 1, 1, T]`, int64.
        keys: of `turn_keys`.
        logits: from products to logits.
        see: sinks and window.
        turns: as for the keys.
    """
    x = _products(q, q_pos, keys, logits, see, turns)
    distance = None if logits.slopes is None else _distance(q_pos, keys.pos, see.sink, turns)[:, :, None]
    return weigh_products(x, logits, distance, _hidden(see, q_pos, keys.pos)[:, :, None])


def weigh_products(x: Tensor, logits: Logits, distance: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """`weigh`, from the products on.

    Args:
        x: `[B, H, G, T, S]`, scaled products; used up.
        logits: from products to logits.
        distance: from the query to the key, not above 0, of a shape that fits; None where there are no slopes.
        hidden: bool, likewise; true where a query does not see a key.
    """
    groups = (1, x.shape[1], -1, 1, 1)
    if logits.softcap is not None:
        x = logits.softcap * torch.tanh(x / logits.softcap)
    if logits.slopes is not None and distance is not None:
        x = x + logits.slopes.to(x).view(groups) * distance.to(x)
    x = x.masked_fill_(hidden, float("-inf"))
    return softmax(x, None if logits.sink_logits is None else logits.sink_logits.to(x).view(groups))


def average(weights: Tensor, total: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Values `[B, H, S, Dv]` by their weights: `[B, Hq, T, Dv]`."""
    out = weights.flatten(2, 3) @ v.to(weights.dtype)
    return (torch.unflatten(out, 2, weights.shape[2:4]) / total).to(dtype).flatten(1, 2)


def _products(q: Tensor, q_pos: Tensor, keys: Keys, logits: Logits, see: Visibility, turns: Turns | None) -> Tensor:
    """Scaled products of queries and keys at the places where they read each other."""
    if turns is None or turns.inv_freq is None:
        return products(q, keys.near, logits.scale)
    own = turns.laps(q_pos)
    if keys.lap is not None:
        x = products(_turn(q, (own - keys.lap) * turns.lap, turns), keys.near, logits.scale)
    else:  # of their own lap or of the one before
        before = products(_turn(q, torch.full_like(q_pos, turns.lap), turns), keys.near, logits.scale)
        earlier = own[..., :, None] > turns.laps(keys.pos)[..., None, :]
        x = torch.where(earlier[:, :, None], before, products(q, keys.near, logits.scale))
    count = keys.first.shape[2]
    if not count:
        return x
    pos = keys.pos[..., None, :count]
    if turns.clamp is None:
        elsewhere, there = turns.sink_pos[:, None], pos < see.sink
    else:
        elsewhere, there = torch.full_like(q_pos, turns.clamp), pos < (q_pos - turns.clamp)[..., None]
    turned = _turn(q, elsewhere - (q_pos - turns.lap * own), turns)
    x[..., :count] = torch.where(there[:, :, None], products(turned, keys.first, logits.scale), x[..., :count])
    return x


def products(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled products, the G query heads of a key head side by side: `[B, H, G, T, S]`, float32 or better."""
    work = torch.promote_types(q.dtype, torch.float32)
    grouped = (q.to(work) * scale).reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    return torch.unflatten(grouped @ k.to(work).transpose(2, 3), 2, (-1, q.shape[2]))


def _turn(x: Tensor, delta: Tensor, turns: Turns) -> Tensor:
    """Turn `[B, H, T, D]` by `delta` `[B or 1, H or 1, T]`, in float32 or better."""
    assert turns.inv_freq is not None
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # one rounding less
    if delta.shape[1] == 1:
        return rotate(x, delta[:, 0], turns.inv_freq, turns.interleaved)
    turned = rotate(x.flatten(0, 1)[:, None], delta.flatten(0, 1), turns.inv_freq, turns.interleaved)
    return turned.view(x.shape)


def visible(see: Visibility, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Which key each query sees: of positions `[..., T]` and `[..., S]`, `[..., T, S]`, bool."""
    k_pos = k_pos[..., None, :]
    distance = q_pos[..., :, None] - k_pos
    seen = (distance >= 0) & (k_pos >= 0)
    if see.window is not None:
        seen &= (distance < see.window) | (k_pos < see.sink)
    return seen


def _hidden(see: Visibility, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """The opposite of `visible`; without a window in one comparison, for there may be very many."""
    if see.window is not None:
        return ~visible(see, q_pos, k_pos)
    return torch.where(k_pos < 0, _NEVER, k_pos)[..., None, :] > q_pos[..., :, None]


def _distance(q_pos: Tensor, k_pos: Tensor, sink: int, turns: Turns | None) -> Tensor:
    """Key position minus query position, as the query reads it: `[B or 1, H or 1, T, S]`."""
    near = k_pos[..., None, :] - q_pos[..., :, None]
    if turns is None:
        return near
    if turns.clamp is not None:
        return near.clamp(min=-turns.clamp)
    if not sink:
        return near
    return torch.where((k_pos < sink)[..., None, :], k_pos[..., None, :] - turns.sink_pos[:, None, :, None], near)


def softmax(x: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights over the last axis before division, and what to divide by; a sink logit has a share and no value."""
    top = x.detach().amax(-1, keepdim=True)
    if sinks is not None:
        top = torch.maximum(top, sinks.detach())
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = x.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    return weights, total.masked_fill(total == 0, 1.0)


def positions(see: Visibility, tokens: int, stored: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions of queries `[B or 1, T]` and of key columns `[B or 1, S]`."""
    k_pos = torch.arange(stored, device=device)[None] if see.k_pos is None else see.k_pos
    q_pos = torch.arange(stored - tokens, stored, device=device)[None] if see.q_pos is None else see.q_pos
    return q_pos, k_pos


def empty_out(q: Tensor, width: int) -> Tensor:
    """`[B, Hq, T, width]`, laid out as `[B, T, Hq, width]`, in which transformers wants it."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], width).transpose(1, 2)


def join(parts: Iterable[tuple[slice, Tensor]], out: Tensor) -> Tensor:
    """Put blocks of queries into `out` `[B, Hq, T, Dv]`; a new tensor where gradients are wanted.

    `out` exists before the first block: results kept between the blocks' large temporaries would keep the allocator
    from using the same memory again.
    """
    if torch.is_grad_enabled() and out.shape[2]:
        return torch.cat([part for _, part in parts], 2)
    for rows, part in parts:
        out[:, :, rows] = part
    return out
