"""`ops.append_pages` in Triton: one program writes the tokens of a row and KV head, and makes their bounds anew."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..types import Packed, parts
from .arguments import LEAST, MOST, bits_of, on, reject_dtypes, rows_of, width_of
from .rows import bound, extremes, write
from .tiles import head_of, read

FEW = 16
"""Tokens of a row."""
LONGEST = 256
"""Tokens of a sub-block."""


@triton.jit
def _kernel(
    k_store, v_store, k, v, pos, pos_b, sink, ring, bounds, sub, tokens,
    DIM: tl.constexpr, WIDTH: tl.constexpr, V_DIM: tl.constexpr, V_WIDTH: tl.constexpr, K_BITS: tl.constexpr,
    V_BITS: tl.constexpr, FEW: tl.constexpr, RING: tl.constexpr, BOUNDED: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(0), tl.program_id(1)
    keys, values = head_of(k_store, batch, head), head_of(v_store, batch, head)
    fresh_k = k[0] + batch.to(tl.int64) * k[1] + head * k[2]
    fresh_v = v[0] + batch.to(tl.int64) * v[1] + head * v[2]
    for t in range(tokens):
        at = tl.load(pos + batch * pos_b + t)
        if at >= 0:
            slot = at
            if RING:
                slot = tl.where(at < sink, at, sink + (at - sink) % ring)
            one = tl.zeros((1,), tl.int32)
            write(keys, fresh_k + t * k[3] + one, slot + one, one == 0, one == 0, DIM, WIDTH, K_BITS)
            write(values, fresh_v + t * v[3] + one, slot + one, one == 0, one == 0, V_DIM, V_WIDTH, V_BITS)
    if BOUNDED:
        tl.debug_barrier()  # what was written is read again
        few, offsets = tl.arange(0, FEW), tl.arange(0, SUB)
        last = tl.max(tl.load(pos + batch * pos_b + few, mask=few < tokens, other=-1), 0)
        like = tl.zeros((1,), k[0].dtype.element_ty)
        for t in range(tokens):
            at = tl.load(pos + batch * pos_b + t)
            if at >= 0:
                entry = at // sub
                there = (offsets < sub) & (entry * sub + offsets <= last)
                some, others = read(keys, entry * sub, offsets, there, like, DIM, WIDTH, K_BITS, True)
                to = bounds[0] + batch.to(tl.int64) * bounds[1] + head * bounds[2] + entry * (2 * DIM)
                least, largest = extremes(some, there)
                bound(to, least, largest, DIM, WIDTH, 2 if K_BITS == 4 else 1)
                if K_BITS == 4:
                    least, largest = extremes(others, there)
                    bound(to + 1, least, largest, DIM, WIDTH, 2)


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
    """Why the kernel does not take these arguments, or None."""
    if k.shape[2] > FEW:
        return f"takes at most {FEW} tokens a row"
    if bounds is not None and sub > LONGEST:
        return f"takes at most {LONGEST} tokens of a sub-block"
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
    """Why tokens, however many, are not stored so, or None."""
    if 0 in (k.numel(), v.numel()):
        return "takes no empty tensors"
    if any(x.device != k.device for x in (k_store, v_store, v, pos)):
        return "needs the store, the tokens and their positions on one device"
    reason = reject_dtypes("the store and the tokens", k, v, k_store, v_store)
    if reason is not None:
        return reason
    if max(k.shape[3], v.shape[3]) > MOST:
        return f"takes at most {MOST} channels"
    if any(y.stride(-1) != 1 and y.shape[-1] > 1 for x in (k_store, v_store) for y in parts(x)):
        return "needs channels that lie side by side"
    if any(x.scale.stride() != x.zero.stride() for x in (k_store, v_store) if isinstance(x, Packed)):
        return "needs scales and zeros that lie alike"
    if bounds is None:
        return None
    if ring is not None:
        return "keeps no bounds of a ring"
    if bounds.dtype != k.dtype or bounds.stride()[2:] != (2 * k.shape[3], k.shape[3], 1):
        return "needs bounds in the dtype of the keys, and side by side"
    return None


def run(
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
    k, v = (x.detach() if x.stride(3) == 1 else x.detach().contiguous() for x in (k, v))
    pos = pos.contiguous()
    with on(k.device):
        _kernel[(k.shape[1], k.shape[0])](
            rows_of(k_store),
            rows_of(v_store),
            (k, *k.stride()[:3]),
            (v, *v.stride()[:3]),
            pos,
            0 if len(pos) == 1 else pos.shape[1],
            sink,
            ring or 1,
            None if bounds is None else (bounds, *bounds.stride()[:2]),
            sub,
            k.shape[2],
            DIM=k.shape[3],
            WIDTH=width_of(k.shape[3], bits_of(k_store)),
            V_DIM=v.shape[3],
            V_WIDTH=width_of(v.shape[3], bits_of(v_store)),
            K_BITS=bits_of(k_store),
            V_BITS=bits_of(v_store),
            FEW=FEW,
            RING=ring is not None,
            BOUNDED=bounds is not None,
            SUB=max(LEAST, triton.next_power_of_2(sub)) if bounds is not None else LEAST,
        )
