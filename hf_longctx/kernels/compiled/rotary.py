"""`ops.rotate_heads` in the compiled library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..dispatch import Implementation
from . import library

PIECE = 4
"""Elements that are read at once."""


class HflTurn(ctypes.Structure):
    """`hfl_turn`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "q_heads", "kv_heads", "tokens", "dim", "dtype")),
        *((name, ctypes.c_int32) for name in ("size", "pairs", "angle_dtype")),
        *((name, ctypes.c_void_p) for name in ("q", "k")),
        *((name, ctypes.c_int64) for name in ("q_b", "q_h", "q_t", "k_b", "k_h", "k_t")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((name, ctypes.c_int64) for name in ("angle_b", "angle_t")),
        *((name, ctypes.c_void_p) for name in ("q_out", "k_out", "stream")),
    )


def reject(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, size: int) -> str | None:
    """Why the library does not take these arguments, or None."""
    reason = library.reason_on_cuda(q)
    if reason is not None:
        return reason
    if not q.numel():
        return "takes no empty queries"
    inputs = (q, k, cos, sin)
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return "computes no gradients"
    if not q.device == k.device == cos.device == sin.device:
        return "needs queries, keys and angles on one device"
    if q.dtype != k.dtype or q.dtype not in library.DTYPES:
        return "needs queries and keys in one dtype, float32, float16 or bfloat16"
    if cos.dtype != sin.dtype or cos.dtype not in (q.dtype, torch.float32):
        return "needs cos and sin in the dtype of the queries, or in float32"
    if q.shape[3] % 8 or size % 8:
        return "takes multiples of 8 channels"
    if not all(map(_in_pieces, inputs)):
        return f"needs channels that lie side by side, and rows that begin at multiples of {PIECE} elements"
    return None


def _in_pieces(x: Tensor) -> bool:
    steps = x.data_ptr() // x.itemsize
    for stride in x.stride()[:-1]:
        steps |= stride
    return steps % PIECE == 0 and x.stride(-1) == 1


def rotate_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`ops.rotate_heads`."""
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    (rows, heads, tokens, dim), kv_heads, width = q.shape, k.shape[1], cos.shape[2]
    out = q.new_empty(*q.shape), k.new_empty(*k.shape)  # a shape as it is takes torch longer to read
    block = HflTurn(rows, heads, kv_heads, tokens, dim, library.DTYPES[q.dtype])
    block.size, block.pairs, block.angle_dtype = size, width < size, library.DTYPES[cos.dtype]
    block.q, (block.q_b, block.q_h, block.q_t) = q.data_ptr(), q.stride()[:3]
    block.k, (block.k_b, block.k_h, block.k_t) = k.data_ptr(), k.stride()[:3]
    block.cos, block.sin = cos.data_ptr(), sin.data_ptr()
    block.angle_b, block.angle_t = 0 if len(cos) == 1 else cos.stride(0), cos.stride(1)
    block.q_out, block.k_out = (x.data_ptr() for x in out)
    library.run("turn", block, q.device)
    return out


OPS = {"rotate_heads": Implementation(rotate_heads, reject)}
