"""`ops.bring_blocks` and `ops.copy_blocks` in the compiled library, for CUDA: nothing waits for the device."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..dispatch import Implementation
from ..types import HostBlocks, Packed, Places, parts
from . import library

MOST_POOL, PARTS = 4096, 6


class HflBlocks(ctypes.Structure):
    """`hfl_blocks`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "kv_heads", "block", "sinks", "tail", "pages")),
        ("data", ctypes.c_void_p * PARTS),
        ("bytes", ctypes.c_int32 * PARTS),
        ("table", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("segments", "per_segment")),
    )


class HflBring(ctypes.Structure):
    """`hfl_bring`."""

    __slots__ = ()
    _fields_ = (
        ("at", HflBlocks),
        *((name, ctypes.c_int32) for name in ("select_heads", "chosen", "pool")),
        ("ids", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("ids_b", "ids_h")),
        ("lengths", ctypes.c_void_p),
        ("lengths_b", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("held", "counts", "places", "stream")),
    )


class HflCopy(ctypes.Structure):
    """`hfl_copy`."""

    __slots__ = ()
    _fields_ = (
        ("at", HflBlocks),
        *((name, ctypes.c_void_p) for name in ("first", "last")),
        *((name, ctypes.c_int64) for name in ("first_b", "last_b")),
        *((name, ctypes.c_int32) for name in ("most", "out")),
        ("stream", ctypes.c_void_p),
    )


def reject(k: Tensor | Packed, v: Tensor | Packed, host: HostBlocks, places: Places) -> str | None:
    """Why the library does not move these blocks, or None."""
    reason = library.reason(k.device)
    if reason is not None:
        return reason
    if k.device.type != "cuda":
        return "moves blocks on CUDA only"
    if host.table is None or host.table.device != k.device:
        return "needs host memory that the device reads by itself, not files"
    tensors = (*parts(k), *parts(v))
    if not all(x.is_contiguous() and x.shape[2] % places.block == 0 for x in tensors):
        return "needs contiguous keys and values in whole blocks"
    if any(x.data_ptr() % 16 or places.block * x.shape[3] * x.itemsize % 16 for x in tensors):
        return "needs blocks of whole pieces of 16 bytes"
    return None


def reject_bring(
    k: Tensor | Packed,
    v: Tensor | Packed,
    host: HostBlocks,
    ids: Tensor,
    lengths: Tensor,
    pool: Tensor,
    counts: Tensor,
    places: Places,
) -> str | None:
    """Likewise of `bring_blocks`."""
    if pool.shape[3] > MOST_POOL:
        return f"takes a pool of at most {MOST_POOL} blocks"
    return reject(k, v, host, places)


def reject_copy(
    k: Tensor | Packed,
    v: Tensor | Packed,
    host: HostBlocks,
    first: Tensor,
    last: Tensor,
    most: int,
    places: Places,
    out: bool,
) -> str | None:
    """Likewise of `copy_blocks`."""
    return reject(k, v, host, places)


def bring_blocks(
    k: Tensor | Packed,
    v: Tensor | Packed,
    host: HostBlocks,
    ids: Tensor,
    lengths: Tensor,
    pool: Tensor,
    counts: Tensor,
    places: Places,
) -> Tensor:
    """`ops.bring_blocks`."""
    ids = ids if ids.stride(-1) == 1 else ids.contiguous()
    (rows, heads, _, most), (_, chosen_heads, _, chosen) = pool.shape, ids.shape
    pages = torch.empty(rows, heads, 1, chosen, dtype=torch.int32, device=ids.device)
    block = HflBring(_blocks(k, v, host, places), chosen_heads, chosen, most, ids.data_ptr(), *ids.stride()[:2])
    block.lengths, block.lengths_b = lengths.data_ptr(), _stride(lengths)
    block.held, block.counts, block.places = pool.data_ptr(), counts.data_ptr(), pages.data_ptr()
    library.run("bring", block, ids.device)
    return pages


def copy_blocks(
    k: Tensor | Packed,
    v: Tensor | Packed,
    host: HostBlocks,
    first: Tensor,
    last: Tensor,
    most: int,
    places: Places,
    out: bool,
) -> None:
    """`ops.copy_blocks`."""
    block = HflCopy(_blocks(k, v, host, places), first.data_ptr(), last.data_ptr(), _stride(first), _stride(last))
    block.most, block.out = most, out
    library.run("copy", block, k.device)


def _blocks(k: Tensor | Packed, v: Tensor | Packed, host: HostBlocks, places: Places) -> HflBlocks:
    assert host.table is not None
    tensors = places.paged(k, v)
    block = HflBlocks(*k.shape[:2], places.block, places.sinks, places.tail, tensors[0].shape[2])
    block.data[: len(tensors)] = [x.data_ptr() for x in tensors]
    block.bytes[: len(tensors)] = [x.shape[3] * x.itemsize for x in tensors]
    block.table, block.segments, block.per_segment = host.table.data_ptr(), len(host.table), host.segments[0].shape[2]
    return block


def _stride(x: Tensor) -> int:
    """Of `[B or 1]`: 0 where all rows are alike."""
    return 0 if len(x) == 1 else x.stride(0)


OPS = {
    "bring_blocks": Implementation(bring_blocks, reject_bring),
    "copy_blocks": Implementation(copy_blocks, reject_copy),
}
