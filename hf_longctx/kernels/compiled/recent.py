"""`ops.attend_recent` and `ops.step_recent` in the compiled library, of few queries on CUDA: one launch."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from ..dispatch import Implementation
from ..reference.weigh import empty_out
from ..types import Logits, Packed, Visibility
from . import attend, library, store
from .library import HflAttend
from .store import HflAppend


class HflRecent(ctypes.Structure):
    """`hfl_recent`."""

    __slots__ = ()
    _fields_ = (
        *((name, HflAttend) for name in ("near", "far")),
        *((name, HflAppend) for name in ("near_append", "far_append")),
        ("recent", ctypes.c_int32),
    )


def reject(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    near_k: Tensor,
    near_v: Tensor,
    logits: Logits,
    see: Visibility,
    near_pos: Tensor | None,
    recent: int,
) -> str | None:
    """Why the library does not take these arguments, or None."""
    return (
        library.reason_on_cuda(q, "joins two stores on CUDA only")
        or ("has no ALiBi" if logits.slopes is not None else None)
        or ("needs far keys of few bits" if library.bits(k) == 0 else None)
        or attend.reject(q, k, v, logits, see, None)
        or attend.reject(q, near_k, near_v, logits, see, None)
    )


def attend_recent(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    near_k: Tensor,
    near_v: Tensor,
    logits: Logits,
    see: Visibility,
    near_pos: Tensor | None,
    recent: int,
) -> Tensor:
    """`ops.attend_recent`."""
    q = library.laid_out(q)
    out = empty_out(q, v.shape[3])
    block, held = _arguments(out, q, (k, v), (near_k, near_v), logits, see, near_pos, recent)
    _run(block, q.device)
    del held  # until here the tensors that the block points to had to live
    return out


def _arguments(
    out: Tensor,
    q: Tensor,
    far: tuple[Tensor | Packed, Tensor | Packed],
    near: tuple[Tensor, Tensor],
    logits: Logits,
    see: Visibility,
    near_pos: Tensor | None,
    recent: int,
) -> tuple[HflRecent, list[Tensor]]:
    """The argument block of a call that stores nothing, and what must live as long."""
    q_pos = see.q_pos
    if q_pos is None:
        q_pos = torch.arange(far[0].shape[2] - q.shape[2], far[0].shape[2], device=q.device)[None]
    close = Visibility(0, recent, q_pos, near_pos)
    block = HflRecent(recent=recent)
    block.near, held = attend.arguments(out, q, *near, logits, close, None, None)
    block.far, more = attend.arguments(out, q, *far, logits, replace(see, q_pos=q_pos), None, None)
    return block, held + more


def _run(block: HflRecent, device: torch.device) -> None:
    with torch.cuda.device(device):
        scratch_bytes = library.library().hfl_recent_scratch(ctypes.byref(block))
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
        count = library.library().hfl_recent_counters(ctypes.byref(block))
        block.far.scratch, block.far.counters = scratch.data_ptr(), library.counters(device, count).data_ptr()
        block.far.stream = library.stream(device)
        library.call("hfl_recent_cuda", block)


def reject_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_k: Tensor | Packed,
    far_v: Tensor | Packed,
    near_k: Tensor,
    near_v: Tensor,
    ring: int,
    logits: Logits,
    see: Visibility,
    near_pos: Tensor | None,
    recent: int,
    columns: int,
    near_columns: int,
) -> str | None:
    """Why the library does not take these arguments, or None."""
    if see.q_pos is None:
        return "needs to be told where tokens stand"
    where = (k, v, see.q_pos, 0)
    return (
        reject(q, far_k, far_v, near_k, near_v, logits, see, near_pos, recent)
        or ("takes one query a row" if q.shape[2] != 1 else None)
        or store.reject(far_k, far_v, *where, None, None, 1, None)
        or store.reject(near_k, near_v, *where, ring, None, 1, None)
    )


def step_recent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    far_k: Tensor | Packed,
    far_v: Tensor | Packed,
    near_k: Tensor,
    near_v: Tensor,
    ring: int,
    logits: Logits,
    see: Visibility,
    near_pos: Tensor | None,
    recent: int,
    columns: int,
    near_columns: int,
) -> Tensor:
    """`ops.step_recent`."""
    assert see.q_pos is not None
    q, k, v = (library.laid_out(x) for x in (q, k, v))
    out = empty_out(q, v.shape[3])
    block, held = _arguments(out, q, (far_k, far_v), (near_k, near_v), logits, see, near_pos, recent)
    block.far.stored, block.near.stored = columns, near_columns
    fresh = (k, v, see.q_pos, 0)
    block.far_append, more = store.arguments(far_k, far_v, *fresh, None, None, 1)
    held += more
    block.near_append, more = store.arguments(near_k, near_v, *fresh, ring, None, 1)
    held += more
    _run(block, q.device)
    del held
    return out


OPS = {
    "attend_recent": Implementation(attend_recent, reject),
    "step_recent": Implementation(step_recent, reject_step),
}
