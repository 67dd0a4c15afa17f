"""`ops.score_pages` and `ops.pick_blocks` in the compiled library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..dispatch import Implementation
from . import library

MOST_CHANNELS, MOST_SUBS = 256, 64

SHARES = {"kv_head": 0, "q_head": 1, "all": 2}


class HflScore(ctypes.Structure):
    """`hfl_score`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "q_heads", "kv_heads", "tokens", "dim", "dtype")),
        *((name, ctypes.c_int32) for name in ("entries", "vectors", "subs", "share")),
        ("q", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("q_b", "q_h", "q_t")),
        ("summary", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("s_b", "s_h")),
        *((name, ctypes.c_void_p) for name in ("scores", "stream")),
    )


class HflPick(ctypes.Structure):
    """`hfl_pick`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "heads", "queries", "blocks", "chosen")),
        *((name, ctypes.c_void_p) for name in ("scores", "low", "high")),
        *((name, ctypes.c_int64) for name in ("low_b", "high_b")),
        *((name, ctypes.c_int32) for name in ("sink", "take")),
        *((name, ctypes.c_void_p) for name in ("ids", "scratch", "stream")),
    )


class HflPickMass(ctypes.Structure):
    """`hfl_pick_mass`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "heads", "queries", "blocks")),
        *((name, ctypes.c_void_p) for name in ("scores", "low", "high")),
        *((name, ctypes.c_int64) for name in ("low_b", "high_b")),
        ("sink", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("tau", "ids", "stream")),
    )


def reject_score(q: Tensor, summary: Tensor, subs: int, share: str) -> str | None:
    """Why the library does not compute these scores, or None."""
    reason = library.reason(q.device)
    if reason is not None:
        return reason
    if q.shape[2] > library.FEW:
        return f"takes at most {library.FEW} queries a row"
    if 0 in (q.numel(), summary.numel()):
        return "takes no empty tensors"
    if torch.is_grad_enabled() and (q.requires_grad or summary.requires_grad):
        return "computes no gradients"
    if summary.device != q.device:
        return "needs queries and summaries on one device"
    if summary.dtype != q.dtype or q.dtype not in library.DTYPES:
        return "needs queries and summaries in one dtype, float32, float16 or bfloat16"
    vectors, dim = summary.shape[3:]
    if summary.stride()[2:] != (vectors * dim, dim, 1) or q.stride(-1) != 1:
        return "needs channels, and the entries of a head, that lie side by side"
    if q.is_cuda and (dim % 8 or dim > MOST_CHANNELS):
        return f"takes a multiple of 8 channels, at most {MOST_CHANNELS}, on CUDA"
    if q.is_cuda and subs > MOST_SUBS:
        return f"takes at most {MOST_SUBS} sub-blocks of a block on CUDA"
    if q.is_cuda and not library.aligned(summary):
        return "needs entries that begin at multiples of 16 bytes"
    return None


def score_pages(q: Tensor, summary: Tensor, subs: int, share: str) -> Tensor:
    """`ops.score_pages`."""
    q = library.laid_out(q)
    block, scores = score_arguments(q, summary, subs, share, q.shape[1])
    library.run("score", block, q.device)
    return scores


def score_arguments(q: Tensor, summary: Tensor, subs: int, share: str, heads: int) -> tuple[HflScore, Tensor]:
    """The argument block for so many of the queries' heads, and the scores that it points to."""
    (rows, _, tokens, dim), (kv_heads, entries, vectors) = q.shape, summary.shape[1:4]
    chosen = {"kv_head": kv_heads, "q_head": heads, "all": 1}[share]
    scores = q.new_empty((rows, chosen, tokens, -(-entries // subs)), dtype=torch.float32)
    block = HflScore(rows, heads, kv_heads, tokens, dim, library.DTYPES[q.dtype], entries, vectors, subs, SHARES[share])
    block.q, (block.q_b, block.q_h, block.q_t) = q.data_ptr(), q.stride()[:3]
    block.summary, (block.s_b, block.s_h) = summary.data_ptr(), summary.stride()[:2]
    block.scores = scores.data_ptr()
    return block, scores


def reject_pick(
    scores: Tensor, low: Tensor, high: Tensor, sink: int, take: int | None, tau: Tensor | None, forced: int
) -> str | None:
    """Why the library does not pick out of these scores, or None."""
    reason = library.reason(scores.device)
    if reason is not None:
        return reason
    if take is None and not scores.is_cuda:
        return "picks a share of the attention on CUDA only"
    if scores.dtype != torch.float32:
        return "needs scores in float32"
    if not scores.numel():
        return "takes no empty tensors"
    if {low.device, high.device, *(() if tau is None else (tau.device,))} != {scores.device}:
        return "needs scores and places on one device"
    return None


def pick_blocks(
    scores: Tensor, low: Tensor, high: Tensor, sink: int, take: int | None, tau: Tensor | None, forced: int
) -> Tensor:
    """`ops.pick_blocks`."""
    scores, low, high = scores.contiguous(), low.contiguous(), high.contiguous()
    rows, heads, count, blocks = scores.shape
    chosen = blocks if take is None else min(blocks, sink + forced + take)
    ids = torch.empty(rows, heads, count, chosen, dtype=torch.int32, device=scores.device)
    if take is None:
        assert tau is not None
        places = [x.data_ptr() for x in (scores, low, high)] + [0 if len(x) == 1 else count for x in (low, high)]
        tau = tau.to(torch.float32).contiguous()
        mass = HflPickMass(rows, heads, count, blocks, *places, min(sink, blocks), tau.data_ptr(), ids.data_ptr())
        library.run("pick_mass", mass, scores.device)
    else:
        library.run("pick", pick_arguments(scores, low, high, sink, take, ids), scores.device)
    return ids


def pick_arguments(scores: Tensor, low: Tensor, high: Tensor, sink: int, take: int, ids: Tensor) -> HflPick:
    """The argument block of a pick into `ids`; all of them contiguous."""
    rows, heads, count, blocks = scores.shape
    places = (scores.data_ptr(), low.data_ptr(), high.data_ptr(), *(0 if len(x) == 1 else count for x in (low, high)))
    sizes = (min(sink, blocks), min(take, blocks))
    return HflPick(rows, heads, count, blocks, ids.shape[3], *places, *sizes, ids.data_ptr())


OPS = {
    "score_pages": Implementation(score_pages, reject_score),
    "pick_blocks": Implementation(pick_blocks, reject_pick),
}
