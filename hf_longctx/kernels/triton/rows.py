"""What kernels that store tokens do with rows of a KV head: quantize and write them, bound some."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(x):
    """The whole number nearest to x, |x| < 2^22, of two the even one: no float32 beyond 2^23 has a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def nearest_float(x):
    """The nearest number of e4m3, |x| <= 448, of two the even one, as float32, which a cast does not change then.

    They are 2^-9 apart at least, or an eighth of the power of two below; Triton's interpreter cuts small ones off.
    """
    power = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)
    unit, parts = (power - 3) << 23, (257 - power) << 23
    return nearest(x * parts.to(tl.float32, bitcast=True)) * unit.to(tl.float32, bitcast=True)


@triton.jit
def _packed(x, steps, scale, zero):
    return tl.minimum(tl.maximum(nearest(tl.div_rn(x, scale[:, None]) + zero[:, None]), 0.0), steps)


@triton.jit
def write(head, rows, slots, given, there, DIM: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Fresh rows that begin at addresses `rows` into slots of a KV head, quantized as `encode_kv` does it.

    Those that are `given` are read, those that are also `there` are written. Returns what was stored, in the dtype of
    the rows: `[N, WIDTH]`, and the same again; of 4 bits the even and the odd channels.
    """
    HALF: tl.constexpr = 2 if BITS == 4 else 1
    channels = tl.arange(0, WIDTH)
    inside = (channels * HALF < DIM)[None, :]
    fresh = rows[:, None] + channels[None, :] * HALF
    to = head[0] + (slots * head[3])[:, None] + channels[None, :]
    x = tl.load(fresh, mask=given[:, None] & inside, other=0.0)
    some, others = x, x
    if BITS == 0:
        tl.store(to, x, mask=there[:, None] & inside)
    else:
        other = tl.load(fresh + (HALF - 1), mask=given[:, None] & inside, other=0.0).to(tl.float32)
        wide = x.to(tl.float32)
        least = tl.min(tl.where(inside, tl.minimum(wide, other), float("inf")), 1)
        largest = tl.max(tl.where(inside, tl.maximum(wide, other), float("-inf")), 1)
        steps = 255.0 if BITS == 8 else 15.0
        floor = tl.maximum(tl.abs(least), tl.abs(largest)) * (1.0 / 2048)
        scale = tl.maximum(tl.maximum(tl.div_rn(largest - least, steps), floor), 2.0**-14).to(tl.float16)
        zero = tl.div_rn(-least, scale.to(tl.float32)).to(tl.float16)
        tl.store(head[1] + slots * head[4], scale, mask=there)
        tl.store(head[2] + slots * head[4], zero, mask=there)
        scale, zero = scale.to(tl.float32), zero.to(tl.float32)
        wide, other = _packed(wide, steps, scale, zero), _packed(other, steps, scale, zero)
        payload = wide.to(tl.uint8)
        if BITS == 4:
            payload |= other.to(tl.uint8) << 4
        tl.store(to, payload, mask=there[:, None] & inside)
        some = ((wide - zero[:, None]) * scale[:, None]).to(x.dtype)
        others = ((other - zero[:, None]) * scale[:, None]).to(x.dtype)
    return some, others


@triton.jit
def extremes(stored, there):
    """Least and largest of the rows that are there, `[WIDTH]`, float32."""
    x = stored.to(tl.float32)
    least = tl.min(tl.where(there[:, None], x, float("inf")), 0)
    return least, tl.max(tl.where(there[:, None], x, float("-inf")), 0)


@triton.jit
def bound(to, least, largest, DIM: tl.constexpr, WIDTH: tl.constexpr, EACH: tl.constexpr):
    """Bounds of every EACH-th channel."""
    channels = tl.arange(0, WIDTH) * EACH
    tl.store(to + channels, least.to(to.dtype.element_ty), mask=channels < DIM)
    tl.store(to + DIM + channels, largest.to(to.dtype.element_ty), mask=channels < DIM)
