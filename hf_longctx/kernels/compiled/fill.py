"""`ops.fill_pages`, `ops.encode_kv` and `ops.decode_kv` in the compiled library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import Implementation
from ..fill import GroupFill
from ..types import Packed, slots
from . import library, store
from .library import HflRows, pointer

MOST_PROBLEMS = 65535


class HflFill(ctypes.Structure):
    """`hfl_fill`."""

    __slots__ = ()
    _fields_ = (
        ("at", store.HflAppend),
        *((name, ctypes.c_void_p) for name in ("heads", "read_k", "read_v")),
        *((name, ctypes.c_int64) for name in ("rk_b", "rk_h", "rk_t", "rv_b", "rv_h", "rv_t")),
        *((name, ctypes.c_int32) for name in ("entries", "even", "blank", "count")),
        ("stream", ctypes.c_void_p),
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
    groups: Sequence[GroupFill],
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    first: int | None,
    read: Sequence[Tensor],
    blank: bool,
) -> str | None:
    """Why the library does not take these arguments, or None."""
    reason = library.reason(k.device)
    if reason is not None:
        return reason
    for group in groups:
        reason = store.reject_any(group.k, group.v, k, v, pos, group.ring, group.bounds)
        if reason is not None:
            return reason
        if k.is_cuda and k.shape[0] * slots(group.k).shape[1] > MOST_PROBLEMS:
            return f"takes at most {MOST_PROBLEMS} rows * KV heads"
    for x in read:
        if x.dtype != k.dtype or not library.readable(x):
            return "needs what is read in the dtype of the tokens, in rows that begin at multiples of 16 bytes"
    return None


def fill_pages(
    groups: Sequence[GroupFill],
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    first: int | None,
    read: Sequence[Tensor],
    blank: bool,
) -> None:
    """`ops.fill_pages`; where tokens stand is read on the device alone."""
    blocks, held = (HflFill * len(groups))(), None
    for block, group in zip(blocks, groups, strict=True):
        if held is None:
            where = (pos, group.sink, group.ring, group.bounds, group.sub)
            block.at, held = store.arguments(group.k, group.v, k, v, *where)
            block.even, block.blank, block.count = first is not None, blank, len(groups)
            if read:
                (block.read_k, block.read_v), (mine, other) = map(pointer, read), read
                block.rk_b, block.rk_h, block.rk_t = mine.stride()[:3]
                block.rv_b, block.rv_h, block.rv_t = other.stride()[:3]
        else:  # all but the store is the same
            ctypes.pointer(block)[0] = blocks[0]
            store.at_store(block.at, group.k, group.v, group.sink, group.ring, group.bounds, group.sub)
        block.heads, block.at.kv_heads = pointer(group.heads), slots(group.k).shape[1]
        block.entries = 0 if group.bounds is None else group.bounds.shape[2]
    library.run("fill", blocks[0], k.device)
    del held


def reject_decode(x: Packed) -> str | None:
    """Why the library does not take these values, or None."""
    reason = library.reason(x.device)
    if reason is not None:
        return reason
    if x.payload.ndim != 4 or 0 in x.shape:
        return "takes rows, heads, tokens and channels, none of them empty"
    if x.dtype not in library.DTYPES:
        return "gives float32, float16 or bfloat16"
    if not library.readable(x.payload) or (x.payload.is_cuda and x.shape[3] % 8):
        return "takes channels side by side, on CUDA a multiple of 8 in rows that begin at multiples of 16 bytes"
    if x.payload.is_cuda and x.shape[0] * x.shape[1] > MOST_PROBLEMS:
        return f"takes at most {MOST_PROBLEMS} rows * KV heads"
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


def reject_encode(x: Tensor, bits: int) -> str | None:
    """Why the library does not take these values, or None."""
    reason = library.reason(x.device)
    if reason is not None:
        return reason
    if x.ndim != 4 or 0 in x.shape:
        return "takes rows, heads, tokens and channels, none of them empty"
    if x.dtype not in library.DTYPES:
        return "takes float32, float16 or bfloat16"
    if x.is_cuda and (x.shape[3] * bits % 128 or x.shape[3] > store.MOST_CHANNELS):
        return f"takes rows of whole 16 bytes, of at most {store.MOST_CHANNELS} channels, on CUDA"
    if x.is_cuda and x.shape[0] * x.shape[1] > MOST_PROBLEMS:
        return f"takes at most {MOST_PROBLEMS} rows * KV heads"
    return "takes an even number of channels" if x.shape[3] % (8 // bits) else None


def encode_kv(x: Tensor, bits: int) -> Packed:
    """`ops.encode_kv`: a store of keys alone, as long as the text."""
    x = library.laid_out(x.detach())
    payload = torch.empty(*x.shape[:3], x.shape[3] * bits // 8, dtype=torch.uint8, device=x.device)
    scale, zero = (torch.empty(x.shape[:3], dtype=torch.float16, device=x.device) for _ in range(2))
    out = Packed(payload, scale, zero, bits, x.dtype)
    block = HflFill(store.HflAppend(*x.shape[:3], x.shape[3], 0, library.DTYPES[x.dtype], library.rows(out)))
    block.at.fresh_k, (block.at.fk_b, block.at.fk_h, block.at.fk_t) = x.data_ptr(), x.stride()[:3]
    block.at.capacity, block.at.sub, block.even, block.count = x.shape[2], 1, True, 1
    library.run("fill", block, x.device)
    return out


OPS = {
    "encode_kv": Implementation(encode_kv, reject_encode),
    "fill_pages": Implementation(fill_pages, reject),
    "decode_kv": Implementation(decode_kv, reject_decode),
}
