"""What attention kernels do with a tile: read keys or values, make logits of products, average values by them."""

from __future__ import annotations

import triton
import triton.language as tl

from . import arguments

LOG2_E = tl.constexpr(1.4426950408889634)
COLUMNS, PLACES, LISTS = (tl.constexpr(x) for x in (arguments.COLUMNS, arguments.PLACES, arguments.LISTS))
NEVER = tl.constexpr(2**30)
"""Further than any position."""


@triton.jit
def head_of(rows, batch, head):
    """The rows of one KV head: addresses of what `read` reads, and how far its rows are apart."""
    first = batch.to(tl.int64) * rows[3] + head * rows[4]
    few = batch.to(tl.int64) * rows[6] + head * rows[7]
    return rows[0] + first, rows[1] + few, rows[2] + few, rows[5], rows[8]


@triton.jit
def read(
    head, first, offsets, there, like, DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, CUT: tl.constexpr
):
    """Rows `first + offsets` of a KV head, `[N, WIDTH]`, in the dtype of `like`; zero where they are not there.

    Of WIDTH channels DIM are stored, the others are zero. CUT: some rows may not be there.
    """
    rows = head[0] + first * head[3]
    if BITS == 4:
        halves = tl.arange(0, WIDTH // 2)
        inside = there[:, None] & (halves < DIM // 2)[None, :]
        pairs = tl.load(rows + (offsets * head[3])[:, None] + halves[None, :], mask=inside, other=0)
        payload = tl.interleave(pairs & 15, pairs >> 4)
    else:
        channels = tl.arange(0, WIDTH)
        at = rows + (offsets * head[3])[:, None] + channels[None, :]
        if DIM != WIDTH:
            payload = tl.load(at, mask=there[:, None] & (channels < DIM)[None, :], other=0)
        elif CUT:
            payload = tl.load(at, mask=there[:, None], other=0)
        else:
            payload = tl.load(at)
    if BITS == 0:
        return payload
    few = first * head[4] + offsets * head[4]
    scale = tl.load(head[1] + few, mask=there, other=0.0).to(tl.float32)
    zero = tl.load(head[2] + few, mask=there, other=0.0).to(tl.float32)
    x = (payload.to(tl.float32) - zero[:, None]) * scale[:, None]
    return tl.where((tl.arange(0, WIDTH) < DIM)[None, :], x, 0.0).to(like.dtype)


@triton.jit
def tanh(x):
    """To float32's precision: near zero, where the quotient would lose it, by its series."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.15, near, tl.where(x < 0.0, -far, far))


@triton.jit
def logits_of(x, distance, scale, softcap, slope, CAPPED: tl.constexpr, SLOPED: tl.constexpr):
    """Logits over ln 2, of products and of key position minus query position."""
    x = softcap * tanh(x * (scale / softcap)) * LOG2_E if CAPPED else x * (scale * LOG2_E)
    if SLOPED:
        x += slope * LOG2_E * distance.to(tl.float32)
    return x


@triton.jit
def average(state, x, factor, v, WHOLE: tl.constexpr):
    """Go on with values of a tile, whose logits over ln 2 are `x * factor`, -inf where nothing is seen.

    A state is sums of values, the largest logit (-inf before the first), and the sum of weights. WHOLE: all is seen.
    """
    sums, top, total = state
    largest = tl.maximum(top, tl.max(x, 1) * factor)
    finite = largest
    if not WHOLE:
        finite = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2(x * factor - finite[:, None])
    before = tl.exp2(top - finite)
    total = total * before + tl.sum(weights, 1)
    sums = tl.dot(weights.to(v.dtype), v, sums * before[:, None], input_precision="ieee")
    return sums, largest, total
