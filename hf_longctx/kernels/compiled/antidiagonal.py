"""`ops.score_antidiagonal` in the compiled library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..dispatch import Implementation
from ..types import Packed
from . import library

MOST_CHANNELS, STRIDES, TILES = 256, (4, 8, 16, 32), (4, 8, 16, 32, 64)
ROUNDED = {"": 0, "fp8": 1, "int8": 2}


class HflAntidiagonal(ctypes.Structure):
    """`hfl_antidiagonal`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "q_heads", "kv_heads", "blocks", "stored", "dim", "dtype")),
        *((name, ctypes.c_int32) for name in ("block", "stride", "causal", "rounded")),
        ("q", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("q_b", "q_h", "q_t")),
        ("k", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("k_b", "k_h", "k_t")),
        ("q_pos", ctypes.c_void_p),
        ("q_pos_b", ctypes.c_int64),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("scores", "scratch", "stream")),
    )


def reject(
    q: Tensor, k: Tensor | Packed, q_pos: Tensor, block: int, stride: int, scale: float, causal: bool, rounded: str = ""
) -> str | None:
    """Why the library does not compute these scores, or None."""
    reason = library.reason(q.device)
    if reason is not None:
        return reason
    if not q.is_cuda:
        return "sums up antidiagonals on CUDA only"
    if isinstance(k, Packed):
        return "sums up antidiagonals of keys that are not packed only"
    if {k.device, q_pos.device} != {q.device}:
        return "needs queries, keys and positions on one device"
    if k.dtype != q.dtype or q.dtype not in (torch.float16, torch.bfloat16):
        return "needs queries and keys in one dtype, float16 or bfloat16"
    if not q.numel() or not k.numel():
        return "takes no empty tensors"
    if q.shape[3] % 8 or q.shape[3] > MOST_CHANNELS:
        return f"takes a multiple of 8 channels, at most {MOST_CHANNELS}"
    if stride not in STRIDES or block % stride or block // stride not in TILES:
        return "takes strides of 4, 8, 16 or 32, and blocks of 4, 8, 16, 32 or 64 strides"
    if rounded and not ("sm_90a" in library.about() and torch.cuda.get_device_capability(q.device) == (9, 0)):
        return "multiplies tiles of 8 bits on sm_90 alone"
    return None


def score_antidiagonal(
    q: Tensor, k: Tensor, q_pos: Tensor, block: int, stride: int, scale: float, causal: bool, rounded: str = ""
) -> Tensor:
    """`ops.score_antidiagonal`."""
    q, k, q_pos = library.laid_out(q.detach()), library.laid_out(k.detach()), q_pos.contiguous()
    (rows, heads, places, dim), (kv_heads, stored) = q.shape, k.shape[1:3]
    count = places // block
    scores = torch.empty(rows, heads, count, -(-stored // block), dtype=torch.float32, device=q.device)
    call = HflAntidiagonal(rows, heads, kv_heads, count, stored, dim, library.DTYPES[q.dtype], block, stride, causal)
    call.q, (call.q_b, call.q_h, call.q_t) = q.data_ptr(), q.stride()[:3]
    call.k, (call.k_b, call.k_h, call.k_t) = k.data_ptr(), k.stride()[:3]
    call.q_pos, call.q_pos_b = q_pos.data_ptr(), 0 if len(q_pos) == 1 else places
    call.scale, call.scores, call.rounded = scale, scores.data_ptr(), ROUNDED[rounded]
    with torch.cuda.device(q.device):
        size = library.library().hfl_antidiagonal_scratch(ctypes.byref(call))
    scratch = torch.empty(size, dtype=torch.uint8, device=q.device)
    call.scratch = scratch.data_ptr()
    library.run("antidiagonal", call, q.device)
    return scores


OPS = {"score_antidiagonal": Implementation(score_antidiagonal, reject)}
