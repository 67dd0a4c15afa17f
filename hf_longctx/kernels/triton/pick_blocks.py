"""`ops.pick_blocks` in Triton: the least score that is taken, found by halving the range of its 32 bits.

Of candidates with just that score the first are taken. What is held by those above a score is a sum in float64, in one
order: a choice by share is that of the definition in float64. Of the best they are counted. One program has a row, in
registers unless it is long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import LEAST, on

WHOLE, PART, EACH = 8192, 4096, 8
"""Blocks of a row in registers at most, those of a longer row that are read at a time, and of a thread."""


@triton.jit
def _rank(score):
    """A score as a whole number from 1 on of the same order; NaN is -inf, and -0 is 0."""
    score = tl.where(score != score, float("-inf"), tl.where(score == 0.0, 0.0, score))
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) > 0, ~bits, bits | 0x80000000)


@triton.jit
def _score(rank):
    """Of a rank."""
    return tl.where((rank >> 31) > 0, rank & 0x7FFFFFFF, ~rank).to(tl.float32, bitcast=True)


@triton.jit
def _read(row, begin, first, last, end, BY_SHARE: tl.constexpr, WIDTH: tl.constexpr):
    """Ranks of some blocks, 0 for what is no candidate, and what each of all up to `end` holds: float64, or 1."""
    block = begin + tl.arange(0, WIDTH)
    score = tl.load(row + block, mask=block < end, other=0.0)
    rank = tl.where((block >= first) & (block < last), _rank(score), tl.zeros((), tl.uint32))
    weight = (block < end).to(tl.int32)
    if BY_SHARE:
        weight = tl.where(score != score, float("-inf"), score).to(tl.float64)
    return rank, weight


@triton.jit
def _above(
    row, rank, weight, least, first, last, end, BY_SHARE: tl.constexpr, WIDTH: tl.constexpr, IS_WHOLE: tl.constexpr
):  # fmt: skip
    """Held by candidates above a rank."""
    if IS_WHOLE:
        return tl.sum(tl.where(rank > least, weight, 0), 0)
    total = tl.zeros((), tl.float64 if BY_SHARE else tl.int32)
    for begin in range(0, end, WIDTH):
        rank, weight = _read(row, begin, first, last, end, BY_SHARE, WIDTH)
        total += tl.sum(tl.where(rank > least, weight, 0), 0)
    return total


@triton.jit(do_not_specialize=["low_b", "high_b", "heads", "queries", "chosen", "sink", "take"])
def _kernel(
    scores, low, high, low_b, high_b, tau, ids, heads, queries, blocks, chosen, sink, take,
    BY_SHARE: tl.constexpr, WIDTH: tl.constexpr, IS_WHOLE: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64)
    n, head, batch = line % queries, line // queries % heads, line // queries // heads
    begins, ends = tl.load(low + batch * low_b + n), tl.load(high + batch * high_b + n)
    end = tl.minimum(ends + 1, blocks).to(tl.int32)
    first = tl.minimum(sink, end)
    last = tl.minimum(tl.maximum(begins, first), end).to(tl.int32)
    row, to = scores + line * blocks, ids + line * chosen

    rank, weight = _read(row, 0, first, last, end, BY_SHARE, WIDTH)
    held, wanted, takes_all = 0, take, take >= last - first
    if BY_SHARE:
        held, own, share = tl.zeros((), tl.float64), tl.zeros((), tl.float64), tl.load(tau + head)
        for begin in range(0, end, WIDTH):
            some, worth = _read(row, begin, first, last, end, BY_SHARE, WIDTH)
            held += tl.sum(tl.where(some == 0, worth, 0.0), 0)
            own += tl.sum(tl.where(some > 0, worth, 0.0), 0)
        wanted, takes_all = share.to(tl.float64) * (held + own), (share >= 1.0) | (last <= first)
    least = tl.zeros((), tl.uint32)
    if not takes_all:
        for i in range(0, 32):  # the least rank before which less is held than wanted
            below = least | ((tl.full((), 0x7FFFFFFF, tl.uint32)) >> i)
            before = held + _above(row, rank, weight, below, first, last, end, BY_SHARE, WIDTH, IS_WHOLE)
            least = tl.where(before < wanted, least, below + 1)
    before = held + _above(row, rank, weight, least, first, last, end, BY_SHARE, WIDTH, IS_WHOLE)
    each = tl.full((), 1, tl.int32)
    if BY_SHARE:
        each = tl.maximum(_score(least), 0.0).to(tl.float64)

    filled, ties = 0, 0
    for begin in range(0, blocks, WIDTH):
        block = begin + tl.arange(0, WIDTH)
        rank, weight = _read(row, begin, first, last, end, BY_SHARE, WIDTH)
        tied = (rank == least) & (rank > 0)
        earlier = ties + tl.cumsum(tied.to(tl.int32), 0) - 1
        more = tl.where(earlier > 0, earlier.to(each.dtype) * each, 0)
        picked = (rank > least) | (tied & (before + more < wanted)) | ((rank == 0) & (block < end))
        place = filled + tl.cumsum(picked.to(tl.int32), 0) - 1
        tl.store(to + place, block, mask=picked & (place < chosen))
        filled += tl.sum(picked.to(tl.int32), 0)
        ties += tl.sum(tied.to(tl.int32), 0)
    for begin in range(0, chosen, WIDTH):
        place = begin + tl.arange(0, WIDTH)
        tl.store(to + place, -1, mask=(place >= filled) & (place < chosen))


def reject(
    scores: Tensor, low: Tensor, high: Tensor, sink: int, take: int | None, tau: Tensor | None, forced: int
) -> str | None:
    """Why the kernel does not pick out of these scores, or None."""
    if scores.dtype != torch.float32:
        return "needs scores in float32"
    if not scores.numel():
        return "takes no empty tensors"
    if {low.device, high.device, *(() if tau is None else (tau.device,))} != {scores.device}:
        return "needs scores and places on one device"
    return None


def run(
    scores: Tensor, low: Tensor, high: Tensor, sink: int, take: int | None, tau: Tensor | None, forced: int
) -> Tensor:
    """`ops.pick_blocks`."""
    scores, low, high = scores.contiguous(), low.contiguous(), high.contiguous()
    rows, heads, count, blocks = scores.shape
    chosen = blocks if take is None else min(blocks, sink + forced + take)
    ids = torch.empty(rows, heads, count, chosen, dtype=torch.int32, device=scores.device)
    apart = [0 if len(x) == 1 else count for x in (low, high)]
    shares = scores if tau is None else tau.to(torch.float32).contiguous()
    is_whole = blocks <= WHOLE
    width = max(LEAST, triton.next_power_of_2(blocks)) if is_whole else PART
    with on(scores.device):
        _kernel[(rows * heads * count,)](
            scores, low, high, *apart, shares, ids, heads, count, blocks, chosen, min(sink, blocks),
            0 if take is None else min(take, blocks), BY_SHARE=take is None, WIDTH=width, IS_WHOLE=is_whole,
            num_warps=max(1, min(16, width // (32 * EACH))),
        )  # fmt: skip
    return ids
