"""What attention kernels do with a tile: find and read keys or values, make logits of products, average by them."""

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
def positions(see, batch, rows, tokens, stored, GIVEN: tl.constexpr):
    """Of each query, -1 for none."""
    if GIVEN:
        return tl.load(see[0] + batch * see[1] + rows, mask=rows < tokens, other=-1).to(tl.int32)
    return tl.where(rows < tokens, stored - tokens + rows, -1).to(tl.int32)


@triton.jit
def column_of(pages, i, chosen, BN: tl.constexpr, EACH: tl.constexpr):
    """First column of a tile of the chosen blocks, of EACH tiles."""
    page = tl.load(pages + i // EACH, mask=i // EACH < chosen, other=0)
    return (page * EACH + i % EACH) * BN


@triton.jit
def reached(ids, chosen, low, high, block, stored, clamp, PAGED: tl.constexpr, CUT: tl.constexpr, TURNED: tl.constexpr):
    """Of a list, how many blocks are far to all queries, far to some, seen by all as a whole, and seen by some.

    Each is a number of first blocks; a block is counted among the first and the third only if all of it is stored.
    """
    far, some_far, whole, seen = 0, 0, 0, 0
    for first in range(0, chosen, 128):
        places = first + tl.arange(0, 128)
        block_id = tl.load(ids + places, mask=places < chosen, other=-1)
        begin = block_id * block
        there = (block_id >= 0) & (begin <= high)
        seen += tl.sum(there.to(tl.int32), 0)
        if TURNED:
            some_far += tl.sum((there & (begin < high - clamp)).to(tl.int32), 0)
        if not PAGED:
            there &= begin + block <= stored
        if not CUT:
            whole += tl.sum((there & (begin + block - 1 <= low)).to(tl.int32), 0)
            if TURNED:
                far += tl.sum((there & (begin + block - 1 < low - clamp)).to(tl.int32), 0)
    return far, some_far, whole, seen


@triton.jit
def queries(q, rows, valid, DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Rows `[M, WIDTH]` at these offsets as keys of BITS are read: all channels, or the even ones and the odd ones."""
    EACH: tl.constexpr = 2 if BITS == 4 else 1
    channels = tl.arange(0, WIDTH) * EACH
    at, inside = q + rows[:, None] + channels[None, :], valid[:, None] & (channels < DIM)[None, :]
    first = tl.load(at, mask=inside, other=0.0)
    return first, (tl.load(at + 1, mask=inside, other=0.0) if BITS == 4 else first)


@triton.jit
def _decoded(payload, scale, zero, like):
    """Values; a byte in the last bits of 2^23 is a number at once, which conversion is four times slower at."""
    x = (payload.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return ((x - zero[:, None]) * scale[:, None]).to(like.dtype)


@triton.jit
def read(
    head, first, offsets, there, like, DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, CUT: tl.constexpr
):
    """Rows `first + offsets` of a KV head in the dtype of `like`, zero where they are not there.

    `[N, WIDTH]`, and the same again; of 4 bits the even and the odd channels. Beyond DIM channels is anything finite.
    CUT: some rows may not be there.
    """
    channels = tl.arange(0, WIDTH)
    rows = head[0] + first * head[3]
    at = rows + (offsets * head[3])[:, None] + channels[None, :]
    STORED: tl.constexpr = DIM // 2 if BITS == 4 else DIM
    if STORED != WIDTH:
        payload = tl.load(at, mask=there[:, None] & (channels < STORED)[None, :], other=0)
    elif CUT:
        payload = tl.load(at, mask=there[:, None], other=0)
    else:
        payload = tl.load(at)
    some, others = payload, payload
    if BITS > 0:
        few = first * head[4] + offsets * head[4]
        scale = tl.load(head[1] + few, mask=there, other=0.0).to(tl.float32)
        zero = tl.load(head[2] + few, mask=there, other=0.0).to(tl.float32)
        some = _decoded(payload & 15 if BITS == 4 else payload, scale, zero, like)
        others = _decoded(payload >> 4, scale, zero, like) if BITS == 4 else some
    return some, others


@triton.jit
def products(asked, keys, BITS: tl.constexpr):
    """Of queries and keys, each as `queries` and `read` give them."""
    x = tl.dot(asked[0], tl.trans(keys[0]), input_precision="ieee")
    return tl.dot(asked[1], tl.trans(keys[1]), x, input_precision="ieee") if BITS == 4 else x


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
def nothing(ROWS: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """The state before the first tile: sums of values, of odd channels apart where they are of 4 bits, and so on."""
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    return (
        sums,
        (sums if BITS == 4 else 0.0),
        tl.full((ROWS,), float("-inf"), tl.float32),
        tl.zeros((ROWS,), tl.float32),
    )


@triton.jit
def average(state, x, factor, values, BITS: tl.constexpr, WHOLE: tl.constexpr):
    """Go on with values of a tile, whose logits over ln 2 are `x * factor`, -inf where nothing is seen.

    A state is sums of values, the largest logit (-inf before the first), and the sum of weights. WHOLE: all is seen.
    """
    sums, others, top, total = state
    largest = tl.maximum(top, tl.max(x, 1) * factor)
    finite = largest
    if not WHOLE:
        finite = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2(x * factor - finite[:, None])
    before = tl.exp2(top - finite)
    total = total * before + tl.sum(weights, 1)
    weights = weights.to(values[0].dtype)
    sums = tl.dot(weights, values[0], sums * before[:, None], input_precision="ieee")
    if BITS == 4:
        others = tl.dot(weights, values[1], others * before[:, None], input_precision="ieee")
    return sums, others, largest, total


@triton.jit
def put(out, rows, valid, sums, others, DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Write results at these offsets, in which channels are all, or even and odd ones."""
    EACH: tl.constexpr = 2 if BITS == 4 else 1
    channels = tl.arange(0, WIDTH) * EACH
    at, inside = out + rows[:, None] + channels[None, :], valid[:, None] & (channels < DIM)[None, :]
    tl.store(at, sums.to(out.dtype.element_ty), mask=inside)
    if BITS == 4:
        tl.store(at + 1, others.to(out.dtype.element_ty), mask=inside)
