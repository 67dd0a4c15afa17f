"""A prompt of which all groups of heads of a layer read the same, everything: attention to it in one piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cache.store import Store
from .context import Forward
from .kernels import ops
from .plan import HeadGroup
from .route import goes_in_turn, reads_all, selector_for
from .sight import turns_of


def attend_alike(
    forward: Forward,
    layer: int,
    stores: Sequence[Any],
    heads: Sequence[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: ops.Logits,
) -> Tensor | None:
    """`[B, Hq, T, Dv]`, as group by group, which only store what is theirs; None where groups do not read the same.

    Args:
        forward: the call.
        layer: number of the layer.
        stores: of its groups, as the cache has them.
        heads: `[Hkv']` each, int32, the KV heads of each group.
        q: `[B, Hq, T, D]`.
        k: `[B, Hkv, T, D]`.
        v: `[B, Hkv, T, Dv]`.
        logits: from products to logits.
    """
    step = forward.step
    if step.columns or step.tokens == 1 or step.ragged or forward.tap is not None or torch.is_grad_enabled():
        return None
    if len({group.policy.kv for group, _ in stores}) > 1 or not all(_reads_all(forward, layer, *s) for s in stores):
        return None
    step = step.on(q.device)
    read = () if stores[0][0].policy.kv is None else (torch.empty_like(k), torch.empty_like(v))
    for _, store in stores:
        store.kept.forget()
    groups = [store.begin(k, v, step, own) for (_, store), own in zip(stores, heads, strict=True)]
    ops.fill_pages(groups, k, v, step.pos, 0, read, blank=True)
    return ops.attend_blocks(q, *(read or (k, v)), logits, ops.Visibility(), None)


def _reads_all(forward: Forward, layer: int, group: HeadGroup, store: Any) -> bool:
    """True if each token reads all before it, where the text has them."""
    policy, step = group.policy, forward.step
    if type(store) is not Store or policy.positions.at_read or turns_of(forward, layer, policy, step, None) is not None:
        return False
    if forward.cache is not None and policy.retention in forward.cache.floors:
        return False
    reach, selector = policy.retention.reach(True), selector_for(policy.prefill, step)
    if reach is not None and reach < step.end:
        return False
    return selector is None or (reads_all(selector, step) and not goes_in_turn(policy, selector, step))
