"""`ops.fill_pages` and `ops.decode_kv` in the compiled library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..dispatch import Implementation
from ..types import Packed
from . import library, store
from .library import HflRows, pointer

MOST_CHANNELS = 256


class HflFill(ctypes.Structure):
    """`hfl_fill`."""

    __slots__ = ()
    _fields_ = (
        ("at", store.HflAppend),
        *((name, ctypes.c_void_p) for name in ("heads", "read_k", "read_v")),
        *((name, ctypes.c_int64) for name in ("rk_b", "rk_h", "rk_t", "rv_b", "rv_h", "rv_t")),
        *((name, ctypes.c_int32) for name in ("entries", "even", "blank")),
    )


class HflDecode(ctypes.Structure):
    """`hfl_decode`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "kv_heads", "tokens", "dim", "dtype")),
        ("x", HflRows),
        *((name, ctypes.c_void_p) for name in ("out", "stream")),
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
    heads: Tensor | None,
    read: tuple[Tensor, Tensor] | None,
    blank: bool,
) -> str | None:
    """Why the library does not take these arguments, or None."""
    reason = library.reason_on_cuda(k) or store.reject_any(k_store, v_store, k, v, pos, ring, bounds)
    if reason is not None:
        return reason
    if k.shape[0] * k_store.shape[1] > 65535:
        return "takes at most 65,535 rows * KV heads"
    if read is not None and any(x.dtype != k.dtype or x.stride(-1) != 1 or not library.aligned(x) for x in read):
        return "needs what is read in the dtype of the tokens, in rows that begin at multiples of 16 bytes"
    return None


def fill_pages(
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
    heads: Tensor | None,
    read: tuple[Tensor, Tensor] | None,
    blank: bool,
) -> None:
    """`ops.fill_pages`; where tokens stand is read on the device alone."""
    at, held = store.arguments(k_store, v_store, k, v, pos, sink, ring, bounds, sub)
    at.kv_heads = k_store.shape[1]
    block = HflFill(at, pointer(heads))
    if read is not None:
        (block.read_k, block.read_v), (mine, other) = map(pointer, read), read
        block.rk_b, block.rk_h, block.rk_t = mine.stride()[:3]
        block.rv_b, block.rv_h, block.rv_t = other.stride()[:3]
    block.entries = 0 if bounds is None else bounds.shape[2]
    block.even, block.blank = first is not None, blank
    with torch.cuda.device(k.device):
        block.at.stream = library.stream(k.device)
        library.call("hfl_fill_cuda", block)
    del held


def reject_decode(x: Packed) -> str | None:
    """Why the library does not take these values, or None."""
    reason = library.reason_on_cuda(x.payload)
    if reason is not None:
        return reason
    if x.payload.ndim != 4 or 0 in x.shape:
        return "takes rows, heads, tokens and channels, none of them empty"
    if x.dtype not in library.DTYPES:
        return "gives float32, float16 or bfloat16"
    if x.shape[3] % 8 or not library.aligned(x.payload) or x.payload.stride(-1) != 1:
        return "takes a multiple of 8 channels, side by side, in rows that begin at multiples of 16 bytes"
    if x.scale.stride() != x.zero.stride() or x.scale.stride(-1) != 1:
        return "needs scales and zeros that lie alike, and side by side"
    return None


def decode_kv(x: Packed) -> Tensor:
    """`ops.decode_kv`."""
    rows, heads, tokens, dim = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = HflDecode(rows, heads, tokens, dim, library.DTYPES[x.dtype], library.rows(x), out.data_ptr())
    library.run("decode", block, x.device)
    return out


OPS = {"fill_pages": Implementation(fill_pages, reject), "decode_kv": Implementation(decode_kv, reject_decode)}
