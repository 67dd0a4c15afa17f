"""A decode step of one token in all groups of heads of a layer at once, where one operation does all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cache.index import Bounds
from .cache.place import Place
from .cache.recent import RecentStore
from .cache.rows import View
from .cache.step import Step
from .cache.store import Store
from .context import Forward
from .group import Call, forced_near, note
from .kernels import dispatch, ops
from .kernels.compiled import library
from .kernels.compiled import step as compiled
from .plan import HeadGroup, Selector
from .route import goes_in_turn, reads_all, selector_for
from .select.choose import forced_ahead, most_forced
from .select.scorers import UpperBound

DEVICES = {"cuda"}
"""Types of devices on which layers are read so: there a launch takes longer than what it computes."""

MANY = 1 << 18
"""Tokens of all rows. Beyond, blocks that only store a token would take the places of some that read all others."""


def attend_layer(
    forward: Forward, layer: int, stores: Sequence[Any], q: Tensor, k: Tensor, v: Tensor, logits: ops.Logits
) -> Tensor | None:
    """`[B, 1, Hq, Dv]`, as group by group; None where that is how to do it: room is made then, and nothing is stored.

    Args:
        forward: the call.
        layer: number of the layer.
        stores: of its groups, as the cache has them.
        q: `[B, Hq, T, D]`.
        k: `[B, Hkv, T, D]`.
        v: `[B, Hkv, T, Dv]`.
        logits: from products to logits.
    """
    if obstacle(forward, stores, q) is not None:
        return None
    step = forward.step.on(q.device)
    calls = [Call(forward, layer, group, store, logits) for group, store in stores]
    places = [call.store.place(k[:, : len(call.group.kv_heads)], step) for call in calls]
    if any(call.store.floor is not None for call in calls):
        return None  # a window has just become wider than what is stored
    groups = [_group(call, step, q.shape[0], *place) for call, place in zip(calls, places, strict=True)]
    if q.is_cuda and compiled.reject(q, k, v, logits, groups) is not None:
        return None
    out = ops.attend_layer(q, k, v, logits, groups)
    for call, group in zip(calls, groups, strict=True):
        selector = _chooses(call.group, step)
        if selector is not None and group.ids is not None:
            if group.choice is not None and selector.refresh_every > 1:
                call.store.kept.since = step.columns
            near, visible = forced_near(selector, step, step.pos, 1, q.shape[0])
            note(call, selector, step.pos, ops.Selection(group.ids, group.block, 1), near[1], visible)
    return out


def obstacle(forward: Forward, stores: Sequence[Any], q: Tensor) -> str | None:
    """Why a layer's call is not one operation, as far as is known before room is made; or None.

    Args:
        forward: the call.
        stores: of the layer's groups, as the cache has them.
        q: `[B, Hq, T, D]`.
    """
    if forward.cache is None or forward.step.columns == 0 or forward.step.tokens != 1:
        return "is for one token a row after others"
    if q.device.type not in DEVICES or dispatch.wanted() not in (None, "compiled"):
        return f"is not for {q.device.type}, or another backend was asked for"
    reason = library.reason(q.device)
    if reason is not None:
        return reason
    if forward.tap is not None:
        return "tells nobody what each group of heads read"
    if forward.plan.lap is not None or forward.plan.at_read:
        return "reads keys at their places in the text alone"
    if torch.is_grad_enabled() and q.requires_grad:
        return "computes no gradients"
    if len(stores) == 1 and _chooses(stores[0][0], forward.step) is None:
        rows = q.shape[0]
        if rows > 2 and rows * forward.step.width > MANY:
            return "saves less than it costs where many long rows read all that they see"
    return next(filter(None, (_obstacle_of_group(forward, *stored) for stored in stores)), None)


def _chooses(group: HeadGroup, step: Step) -> Selector | None:
    """How a group of heads chooses blocks in this call; None: it reads all that it sees."""
    selector = selector_for(group.policy.decode, step)
    if selector is None or (not goes_in_turn(group.policy, selector, step) and reads_all(selector, step)):
        return None
    return selector


def _obstacle_of_group(forward: Forward, group: HeadGroup, store: Any) -> str | None:
    if not isinstance(store, Store) or store.k is None:
        return "reads no keys in host memory"
    assert forward.cache is not None
    if isinstance(store, RecentStore):
        return "reads keys of one format"
    if store.floor is not None or store.retention in forward.cache.floors:
        return "reads no windows of which tokens were evicted"
    if store.index is not None and not isinstance(store.index, Bounds):
        return "does not add up attention"
    selector = _chooses(group, forward.step)
    if selector is None:
        return None
    if not isinstance(selector.scorer, UpperBound) or selector.budget.tokens is None:
        return "chooses a number of blocks, by bounds of their keys"
    return "has no choice for each query head" if selector.share == "q_head" else None


def _group(call: Call, step: Step, rows: int, place: Place, view: View) -> ops.GroupStep:
    """What a group of heads does."""
    store, retention = call.store, call.group.policy.retention
    selector = _chooses(call.group, step)
    k, v = store.memory
    at = (retention.sink, place.ring, place.bounds, place.sub)
    heads = tuple(call.group.kv_heads)
    if selector is None:
        see = ops.Visibility(retention.sink, retention.reach(False), step.pos, view.k_pos)
        return ops.GroupStep(heads, k, v, *at, see, view.k.shape[2])
    ids, choice = _choice(call, selector, step, rows)
    see = ops.Visibility(q_pos=step.pos)
    return ops.GroupStep(heads, k, v, *at, see, k.shape[2], ids, selector.block, choice)


def _choice(call: Call, selector: Selector, step: Step, rows: int) -> tuple[Tensor, ops.Choice | None]:
    """Where the blocks that are read stand, and how they are chosen, unless they were some steps ago."""
    kept, again = call.store.kept, selector.refresh_every > 1
    if again and not kept.is_due(selector.refresh_every, step.columns):
        return kept.ids, None
    low, high = forced_near(selector, step, step.pos, 1, rows)[0]
    if again:
        low, high = step.once(("ahead", selector), lambda: forced_ahead(selector, step.lengths))
    assert selector.budget.tokens is not None
    summary, block = call.store.summaries, selector.block
    numbers = (selector.sink_blocks, selector.budget.tokens // block, most_forced(selector, 1))
    choice = ops.Choice(summary, block // call.store.index.sub, selector.share, low, high, *numbers)
    shape = torch.Size((rows, 1 if selector.share == "all" else summary.shape[1], 1, choice.size))
    if not again:
        return torch.empty(shape, dtype=torch.int32, device=summary.device), choice
    return kept.room(shape, summary.device), choice
