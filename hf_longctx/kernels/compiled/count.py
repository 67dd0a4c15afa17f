"""`count.count_blocks` in the compiled library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import Implementation
from . import library

PARTS = 64


class HflCount(ctypes.Structure):
    """`hfl_count`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("parts", "batch", "queries", "chosen", "block")),
        ("heads", ctypes.c_int32 * PARTS),
        ("ids", ctypes.c_void_p * PARTS),
        ("pos", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("pos_b", "pos_n")),
        *((name, ctypes.c_void_p) for name in ("tally", "stream")),
    )


def reject(tally: Tensor, ids: Sequence[Tensor], pos: Tensor, block: int) -> str | None:
    """Why the library does not take these arguments, or None."""
    reason = library.reason_on_cuda(tally)
    if reason is not None:
        return reason
    if any(x.device != tally.device for x in (pos, *ids)):
        return "needs all tensors on one device"
    first = ids[0].shape if ids else torch.Size((0,))
    if any(x.dtype != torch.int32 or not x.numel() or not x.is_contiguous() for x in ids) or not ids:
        return "needs blocks in int32, without gaps"
    if first[0] >= 1 << 16 or any((x.shape[0], *x.shape[2:]) != (first[0], *first[2:]) for x in ids):
        return "needs as many rows, at most 65535, queries and blocks everywhere"
    return None


def count_blocks(tally: Tensor, ids: Sequence[Tensor], pos: Tensor, block: int) -> None:
    """`count.count_blocks`."""
    rows, _, queries, chosen = ids[0].shape
    pos_b, pos_n = pos.expand(rows, queries).stride()
    for start in range(0, len(ids), PARTS):
        part = ids[start : start + PARTS]
        task = HflCount(len(part), rows, queries, chosen, block)
        task.heads[: len(part)] = [x.shape[1] for x in part]
        task.ids[: len(part)] = [x.data_ptr() for x in part]
        task.pos, task.pos_b, task.pos_n, task.tally = pos.data_ptr(), pos_b, pos_n, tally.data_ptr()
        library.run("count", task, tally.device)


OPS = {"count_blocks": Implementation(count_blocks, reject)}
