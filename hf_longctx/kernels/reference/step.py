"""`ops.attend_layer`: the operations that it is defined by, each on the backend that takes it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import dispatch
from ..step import GroupStep
from ..types import Logits, Selection
from .kv import first_columns


def attend_layer(q: Tensor, k: Tensor, v: Tensor, logits: Logits, groups: Sequence[GroupStep]) -> Tensor:
    """`ops.attend_layer`."""
    out = q.new_empty(q.shape[0], 1, q.shape[1], v.shape[3])
    for group in groups:
        kv, heads = _numbers(group.heads, q.shape[1] // k.shape[1], q.device)
        asked = q.index_select(1, heads)
        fresh = (x.index_select(1, kv) for x in (k, v))
        where = (group.see.q_pos, group.sink, group.ring, group.bounds, group.sub, None)
        dispatch.call("append_pages", group.k, group.v, *fresh, *where)
        _choose(group, asked)
        read = None if group.ids is None else Selection(group.ids, group.block, 1)
        stored = (
            (group.k, group.v) if read is not None else (first_columns(x, group.columns) for x in (group.k, group.v))
        )
        part = dispatch.call("attend_pages", asked, *stored, logits.heads(heads), group.see, None, read)
        out[:, 0, heads] = part[:, :, 0]
    return out


@lru_cache(maxsize=4096)
def _numbers(heads: tuple[int, ...], per_kv: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """KV heads, and their query heads, on the device; made once, as making them waits for it."""
    kv = torch.tensor(heads, device=device)
    return kv, (kv[:, None] * per_kv + torch.arange(per_kv, device=device)).flatten()


def _choose(group: GroupStep, q: Tensor) -> None:
    """Fill in the blocks that the group reads, if that is due."""
    choice = group.choice
    if choice is None:
        return
    assert group.ids is not None
    scores = dispatch.call("score_pages", q, choice.summary, choice.subs, choice.share)
    numbers = (choice.sink, choice.take, None, choice.forced)
    group.ids.copy_(dispatch.call("pick_blocks", scores, choice.low, choice.high, *numbers))
