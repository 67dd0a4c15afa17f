"""`ops.attend_layer` in the compiled library, for CUDA: kernels that hand over row by row."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import Implementation
from ..reference.step import attend_layer as one_by_one
from ..step import GroupStep
from ..types import Logits, Selection
from . import attend, library, select, store
from .library import HflAttend
from .select import HflPick, HflScore
from .store import HflAppend

MOST_HEADS, MOST_GROUPS = 128, 16


class HflLayerGroup(ctypes.Structure):
    """`hfl_layer_group`."""

    __slots__ = ()
    _fields_ = (
        ("append", HflAppend),
        ("attend", HflAttend),
        ("score", HflScore),
        ("pick", HflPick),
        ("heads", ctypes.c_uint8 * MOST_HEADS),
    )


class HflLayer(ctypes.Structure):
    """`hfl_layer`."""

    __slots__ = ()
    _fields_ = (
        ("groups", ctypes.POINTER(HflLayerGroup)),
        ("count", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("scratch", "counters", "stream")),
    )


def reject(q: Tensor, k: Tensor, v: Tensor, logits: Logits, groups: Sequence[GroupStep]) -> str | None:
    """Why the library does not take these arguments, or None."""
    reason = library.reason_on_cuda(q)
    if reason is not None:
        return reason
    if q.shape[2] != 1:
        return "takes one query a row"
    if k.shape[1] > MOST_HEADS or len(groups) > MOST_GROUPS:
        return f"takes at most {MOST_HEADS} KV heads in at most {MOST_GROUPS} groups"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "computes no gradients"
    for group in groups:
        reason = _reject_group(q, k, v, logits, group)
        if reason is not None:
            return reason
    return None


def _reject_group(q: Tensor, k: Tensor, v: Tensor, logits: Logits, group: GroupStep) -> str | None:
    pos, choice = group.see.q_pos, group.choice
    if pos is None:
        return "needs to be told where tokens stand"
    if group.ids is not None and (group.ids.shape[1] not in (1, len(group.heads)) or not group.ids.is_contiguous()):
        return "takes a selection for each KV head, or one for all, without gaps"
    where = (pos, group.sink, group.ring, group.bounds, group.sub, None)
    one = q[:, : q.shape[1] // k.shape[1] * len(group.heads)]
    some_k, some_v = (x[:, : len(group.heads)] for x in (k, v))
    reason = store.reject(group.k, group.v, some_k, some_v, *where) or attend.reject(
        one, group.k, group.v, logits, group.see, None, _selection(group)
    )
    if reason is not None or choice is None:
        return reason
    if choice.share == "q_head":
        return "takes no selection for each query head"
    if choice.low.device != q.device or choice.high.device != q.device:
        return "needs places on the device of the queries"
    return select.reject_score(one, choice.summary, choice.subs, choice.share)


def _selection(group: GroupStep) -> Selection | None:
    return None if group.ids is None else Selection(group.ids, group.block, 1)


def attend_layer(q: Tensor, k: Tensor, v: Tensor, logits: Logits, groups: Sequence[GroupStep]) -> Tensor:
    """`ops.attend_layer`."""
    q = library.laid_out(q)
    out = torch.empty(q.shape[0], 1, q.shape[1], v.shape[3], dtype=q.dtype, device=q.device)
    blocks = (HflLayerGroup * len(groups))()
    held: list[Tensor] = []  # what the blocks point to has to live until the call is done
    for block, group in zip(blocks, groups, strict=True):
        held += _fill(block, out, q, k, v, logits, group)
    layer = HflLayer(blocks, len(groups))
    with torch.cuda.device(q.device):
        counters = ctypes.c_int64()
        scratch_bytes = library.library().hfl_layer_scratch(ctypes.byref(layer), ctypes.byref(counters))
        if scratch_bytes < 0:  # blocks that wait for each other must all run at once: these would not
            return one_by_one(q, k, v, logits, groups)
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=q.device)
        layer.scratch = scratch.data_ptr()
        layer.counters = library.counters(q.device, counters.value).data_ptr()
    try:
        library.run("layer", layer, q.device)
    except RuntimeError:
        library.forget_counters(q.device)  # some may have been left as they are
        raise
    del held
    return out


def _fill(
    block: HflLayerGroup, out: Tensor, q: Tensor, k: Tensor, v: Tensor, logits: Logits, group: GroupStep
) -> list[Tensor]:
    """Fill in a group's block; returns what must live as long."""
    per_kv, pos = q.shape[1] // k.shape[1], group.see.q_pos
    assert pos is not None
    block.heads[: len(group.heads)] = group.heads
    block.append, held = store.arguments(group.k, group.v, k, v, pos, group.sink, group.ring, group.bounds, group.sub)
    block.append.kv_heads = len(group.heads)
    by_head = out.transpose(1, 2)
    block.attend, more = attend.arguments(by_head, q, group.k, group.v, logits, group.see, None, _selection(group))
    block.attend.q_heads = per_kv * len(group.heads)
    if group.ids is None:
        block.attend.stored = group.columns
    held += more
    choice = group.choice
    if choice is not None:
        assert group.ids is not None
        low, high = choice.low.contiguous(), choice.high.contiguous()
        of_queries = (choice.summary, choice.subs, choice.share, per_kv * len(group.heads))
        block.score, scores = select.score_arguments(q, *of_queries)
        block.pick = select.pick_arguments(scores, low, high, choice.sink, choice.take, group.ids)
        held += [low, high, scores]
    return held


OPS = {"attend_layer": Implementation(attend_layer, reject)}
