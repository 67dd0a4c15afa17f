"""What was evicted by hand: the oldest position outside the sinks that is still seen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..plan import Plan, Retention
from .ledger import Ledger


def floors(plan: Plan, ledger: Ledger, known: Mapping[Retention, Tensor], room: int) -> dict[Retention, Tensor]:
    """The floors, `[B or 1, 1]`, int64, above which `room` tokens to come push nothing out; arguments of a cache.

    Raises:
        ValueError: `room` is not between 0 and the window, or some heads keep everything.
    """
    groups = [group for layer in plan.layers for group in layer.groups if group.policy.positions.in_cache]
    retentions = {g.policy.retention for g in groups if g.policy.retention.sink} or {g.policy.retention for g in groups}
    if not retentions:
        raise ValueError(
            f"evict: expected a plan that counts positions in the cache; got '{plan.method}', which has "
            "nothing to make room in. Patch with 'streaming_llm'."
        )
    window = min(retention.window or 0 for retention in retentions)
    if not 0 <= room <= window:
        raise ValueError(f"evict: expected room between 0 and the window of {window}; got {room}. Evict less.")
    if not ledger.columns:
        return {}
    lengths = ledger.lengths
    if lengths is None:
        lengths = torch.full((1,), ledger.columns, dtype=torch.int64)
    raised = {}
    for retention in retentions:
        floor = lengths[:, None] - ((retention.window or 0) - room)
        before = known.get(retention)
        raised[retention] = floor if before is None else torch.maximum(before.to(floor.device), floor)
    return raised
