"""A prompt of which each group of heads of a layer reads everything, or a window: one operation stores it for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .cache.store import Store
from .context import Forward
from .kernels import ops
from .kernels.wide import picked
from .plan import HeadGroup
from .route import goes_in_turn, reads_all, selector_for
from .sight import turns_of


@dataclass(frozen=True)
class Order:
    """The heads of a layer group by group, as indices on the device; made once, as making them waits for the device.

    Args:
        q: query heads of each group.
        places: the same, int32.
        kv: KV heads of each group, int32.
        sides: by the number of heads: all of them in this order, and how many each group has.
        back: `[Hq]`, where each query head stands when groups stand side by side.
    """

    q: tuple[Tensor, ...]
    places: tuple[Tensor, ...]
    kv: tuple[Tensor, ...]
    sides: Mapping[int, tuple[Tensor, list[int]]]
    back: Tensor

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys or values `[B, H, T, D]` group by group, all from one copy."""
        heads, sizes = self.sides[x.shape[1]]
        return picked(x, 1, heads).split_with_sizes(sizes, 1)


@lru_cache(maxsize=4096)
def order_of(groups: tuple[tuple[int, ...], ...], per_kv: int, device: torch.device) -> Order:
    """The order of groups with these KV heads, each of which has `per_kv` query heads."""
    kv = [torch.tensor(heads, device=device) for heads in groups]
    q = [(heads[:, None] * per_kv + torch.arange(per_kv, device=device)).flatten() for heads in kv]
    sides = {sum(map(len, side)): (torch.cat(side), list(map(len, side))) for side in (kv, q)}
    places, own = (tuple(heads.int() for heads in side) for side in (q, kv))
    return Order(tuple(q), places, own, sides, torch.cat(q).argsort())


def attend_alike(
    forward: Forward,
    layer: int,
    stores: Sequence[Any],
    order: Order,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: ops.Logits,
) -> Tensor | None:
    """`[B, Hq, T, Dv]`, as group by group; None where a group does something else. Groups that read the same are one.

    Args:
        forward: the call.
        layer: number of the layer.
        stores: of its groups, as the cache has them.
        order: the heads of each group.
        q: `[B, Hq, T, D]`.
        k: `[B, Hkv, T, D]`.
        v: `[B, Hkv, T, Dv]`.
        logits: from products to logits.
    """
    step = forward.step
    if step.columns or step.tokens == 1 or step.ragged or forward.tap is not None or torch.is_grad_enabled():
        return None
    if len({group.policy.kv for group, _ in stores}) > 1 or not all(_reads_near(forward, layer, *s) for s in stores):
        return None
    step = step.on(q.device)
    read = () if stores[0][0].policy.kv is None else (torch.empty_like(k), torch.empty_like(v))
    for _, store in stores:
        store.kept.forget()
    groups = [store.begin(k, v, step, own) for (_, store), own in zip(stores, order.kv, strict=True)]
    ops.fill_pages(groups, k, v, step.pos, 0, read, blank=True)
    k, v = read or (k, v)
    kept = [group.policy.retention for group, _ in stores]
    if all((x.reach(True) or step.end) >= step.end for x in kept):
        return ops.attend_blocks(q, k, v, logits, ops.Visibility(), None)
    out = q.new_empty(q.shape[0], *q.shape[2:0:-1], v.shape[3]).transpose(1, 2)
    for x, own_k, own_v, own, places in zip(kept, order.split(k), order.split(v), order.q, order.places, strict=True):
        see = ops.Visibility(x.sink, x.reach(True))
        ops.attend_heads(q, own_k, own_v, logits.heads(own), see, None, None, places, out)
    return out


def _reads_near(forward: Forward, layer: int, group: HeadGroup, store: Any) -> bool:
    """True if each token reads all before it that its group keeps, where the text has them."""
    policy, step = group.policy, forward.step
    if type(store) is not Store or policy.positions.at_read or turns_of(forward, layer, policy, step, None) is not None:
        return False
    if forward.cache is not None and policy.retention in forward.cache.floors:
        return False
    selector = selector_for(policy.prefill, step)
    return selector is None or (reads_all(selector, step) and not goes_in_turn(policy, selector, step))
