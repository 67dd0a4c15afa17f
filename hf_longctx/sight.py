"""What the queries of a group of heads see, and at which angle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cache.positions import sink_position
from .cache.rows import View
from .cache.step import Step
from .context import Forward
from .kernels import ops
from .limits import straight_to
from .plan import HeadPolicy, Retention


def floor_of(forward: Forward, retention: Retention, store: Any, device: torch.device) -> Tensor | None:
    """`[B or 1, 1]`, oldest position outside the sinks neither evicted by hand nor lost; None: all there."""
    evicted = None if forward.cache is None else forward.cache.floors.get(retention)
    lost = None if store is None else store.floor
    both = [floor.to(device) for floor in (evicted, lost) if floor is not None]
    return torch.maximum(both[0], both[-1]) if both else None


def above(see: ops.Visibility, floor: Tensor, view: View, step: Step) -> ops.Visibility:
    """The same without the tokens that were evicted by hand."""
    k_pos = torch.arange(view.k.shape[2], device=floor.device)[None] if view.k_pos is None else view.k_pos
    k_pos = torch.where((k_pos < see.sink) | (k_pos >= floor), k_pos, -1)
    return ops.Visibility(see.sink, see.window, step.pos, k_pos)


def turns_of(forward: Forward, layer: int, policy: HeadPolicy, step: Step, floor: Tensor | None) -> ops.Turns | None:
    """How queries of heads with a policy are turned; None while every key stands where the text has it."""
    plan, retention, lap = forward.plan, policy.retention, forward.plan.lap
    if lap is None:
        return None
    rotary, clamp = forward.rotary[layer], policy.positions.distance
    straight = step.end <= straight_to(plan, policy, not step.decodes)
    if clamp is not None:
        return None if straight else ops.Turns(step.pos, lap, plan.sink, rotary.inv_freq, rotary.interleaved, clamp)
    reach = retention.reach(not step.decodes)
    if reach is None or (straight and floor is None):
        return None
    moved = None if floor is None else floor.to(step.device)
    sinks = forward.once(
        ("sink_position", retention, step.device), lambda: sink_position(step.pos, retention.sink, reach, moved)
    )
    return ops.Turns(sinks, lap, plan.sink, rotary.inv_freq, rotary.interleaved)
