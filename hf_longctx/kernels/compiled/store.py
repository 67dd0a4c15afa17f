"""`ops.append_pages` in the compiled library."""

from __future__ import annotations

import ctypes

from torch import Tensor

from ..dispatch import Implementation
from ..types import Packed, slots
from . import library
from .library import HflRows, pointer

MOST_CHANNELS = 256


class HflAppend(ctypes.Structure):
    """`hfl_append`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "kv_heads", "tokens", "dim", "v_dim", "dtype")),
        *((name, HflRows) for name in ("k", "v")),
        *((name, ctypes.c_void_p) for name in ("fresh_k", "fresh_v")),
        *((name, ctypes.c_int64) for name in ("fk_b", "fk_h", "fk_t", "fv_b", "fv_h", "fv_t")),
        ("pos", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("pos_b", "sink", "ring")),
        ("bounds", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("bounds_b", "bounds_h")),
        *((name, ctypes.c_int32) for name in ("sub", "capacity")),
        ("stream", ctypes.c_void_p),
    )


def reject(
    k_store: Tensor | Packed,
    v_store: Tensor | Packed,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    sink: int,
    ring: int | None,
    bounds: Tensor | None,
    sub: int,
    first: int | None,
) -> str | None:
    """Why the library does not take these arguments, or None."""
    reason = library.reason(k.device)
    if reason is not None:
        return reason
    if k.shape[2] > library.FEW:
        return f"takes at most {library.FEW} tokens a row"
    return reject_any(k_store, v_store, k, v, pos, ring, bounds)


def reject_any(
    k_store: Tensor | Packed,
    v_store: Tensor | Packed,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    ring: int | None,
    bounds: Tensor | None,
) -> str | None:
    """The same of any number of tokens, where there is a library."""
    if 0 in (k.numel(), v.numel()):
        return "takes no empty tensors"
    stores, device, dtype = (slots(k_store), slots(v_store)), k.device, k.dtype
    if not device == stores[0].device == stores[1].device == v.device == pos.device:
        return "needs the store, the tokens and their positions on one device"
    if not dtype == k_store.dtype == v_store.dtype == v.dtype or dtype not in library.DTYPES:
        return "needs the store and the tokens in one dtype, float32, float16 or bfloat16"
    if not stores[0].stride(-1) == stores[1].stride(-1) == 1:
        return "needs channels that lie side by side"
    if bounds is not None:
        if ring is not None:
            return "keeps no bounds of a ring"
        if bounds.dtype != dtype or bounds.stride()[2:] != (2 * k.shape[3], k.shape[3], 1):
            return "needs bounds in the dtype of the keys, and side by side"
    return _reject_on_cuda(stores, k, v) if k.is_cuda else None


def _reject_on_cuda(stores: tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> str | None:
    dim, v_dim = k.shape[3], v.shape[3]
    if dim % 8 or v_dim % 8 or max(dim, v_dim) > MOST_CHANNELS:
        return f"takes a multiple of 8 channels, at most {MOST_CHANNELS}, on CUDA"
    if not (library.aligned(stores[0]) and library.aligned(stores[1])):
        return "needs rows that begin at multiples of 16 bytes"
    return None


def append_pages(
    k_store: Tensor | Packed,
    v_store: Tensor | Packed,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    sink: int,
    ring: int | None,
    bounds: Tensor | None,
    sub: int,
    first: int | None,
) -> None:
    """`ops.append_pages`; positions are read where they lie, so that a captured call can be replayed."""
    block, held = arguments(k_store, v_store, k, v, pos, sink, ring, bounds, sub)
    library.run("append", block, k.device)
    del held


def arguments(
    k_store: Tensor | Packed,
    v_store: Tensor | Packed,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    sink: int,
    ring: int | None,
    bounds: Tensor | None,
    sub: int,
) -> tuple[HflAppend, list[Tensor]]:
    """The argument block, and tensors made for it, which must live as long."""
    k, v, pos = library.laid_out(k.detach()), library.laid_out(v.detach()), pos.contiguous()
    block = HflAppend(*k.shape, v.shape[3], library.DTYPES[k.dtype])
    at_store(block, k_store, v_store, sink, ring, bounds, sub)
    block.fresh_k, (block.fk_b, block.fk_h, block.fk_t) = k.data_ptr(), k.stride()[:3]
    block.fresh_v, (block.fv_b, block.fv_h, block.fv_t) = v.data_ptr(), v.stride()[:3]
    block.pos, block.pos_b = pos.data_ptr(), 0 if pos.shape[0] == 1 else pos.shape[1]
    return block, [k, v, pos]


def at_store(
    block: HflAppend,
    k_store: Tensor | Packed,
    v_store: Tensor | Packed,
    sink: int,
    ring: int | None,
    bounds: Tensor | None,
    sub: int,
) -> None:
    """Fill in where tokens go."""
    block.k, block.v = library.rows(k_store), library.rows(v_store)
    block.sink, block.ring = sink, ring or 0
    block.bounds = None
    if bounds is not None:
        block.bounds, (block.bounds_b, block.bounds_h) = pointer(bounds), bounds.stride()[:2]
    block.sub, block.capacity = sub, slots(k_store).shape[2]


OPS = {"append_pages": Implementation(append_pages, reject)}
