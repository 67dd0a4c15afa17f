"""`ops.attend_recent` in the compiled library, of few queries on CUDA: near keys in one launch, far ones in another."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch
from torch import Tensor

from ..dispatch import Implementation
from ..reference.weigh import empty_out
from ..types import Logits, Packed, Visibility
from . import attend, library
from .library import HflBeside


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
    sums = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    q_pos = see.q_pos
    if q_pos is None:
        q_pos = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[None]
    near = Visibility(0, recent, q_pos, near_pos)
    bare = replace(logits, sink_logits=None)  # whose share is added once
    first, held = attend.arguments(out, q, near_k, near_v, bare, near, None, None)
    then, more = attend.arguments(out, q, k, v, logits, replace(see, q_pos=q_pos), None, None)
    held += more + attend.split(first, q.device) + attend.split(then, q.device, first)
    with torch.cuda.device(q.device):
        for block, beside in ((first, HflBeside(reads=0, before=0)), (then, HflBeside(reads=1, before=recent))):
            block.stream, beside.sums = library.stream(q.device), sums.data_ptr()
            library.call("hfl_attend_beside_cuda", block, ctypes.byref(beside))
    del held  # until here the tensors that the blocks point to had to live: both run at a time
    return out


OPS = {"attend_recent": Implementation(attend_recent, reject)}
