"""`ops.score_pages` in Triton: products of the queries of a KV head with summaries, which are read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arguments import LEAST, MOST, on, reject_dtypes, width_of

QUERIES, SUBS, ENTRIES = 64, 64, 64
"""Queries of the heads of a KV head, sub-blocks of a block, and entries of a tile, at most."""


@triton.jit
def _kernel(
    q, summary, out, heads, tokens, entries, blocks, subs,
    GROUP: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    BOUNDS: tl.constexpr, BLOCKS: tl.constexpr, SUBS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    kv_head, batch = tl.program_id(1), tl.program_id(2)
    rows, channels = tl.arange(0, ROWS * GROUPS), tl.arange(0, WIDTH)
    token, member = rows // GROUPS, rows % GROUPS
    valid = (token < tokens) & (member < GROUP)
    at = q[0] + batch.to(tl.int64) * q[1] + (kv_head * GROUP + member) * q[2] + token * q[3]
    inside = (channels < DIM)[None, :]
    asked = tl.load(at[:, None] + channels[None, :], mask=valid[:, None] & inside, other=0.0)

    place = tl.arange(0, BLOCKS * SUBS)
    block = tl.program_id(0) * BLOCKS + place // SUBS
    entry = block * subs + place % SUBS
    there = (place % SUBS < subs) & (entry < entries)
    R: tl.constexpr = 2 if BOUNDS else 1
    first = summary[0] + batch.to(tl.int64) * summary[1] + kv_head * summary[2]
    at = first + entry.to(tl.int64) * (R * DIM)
    if BOUNDS:
        there &= tl.load(at, mask=there, other=float("inf")) <= tl.load(at + DIM, mask=there, other=float("-inf"))
    inside &= there[:, None]
    vectors = tl.load(at[:, None] + channels[None, :], mask=inside, other=0.0)
    below = tl.where(asked < 0.0, asked, 0.0).to(asked.dtype) if BOUNDS else asked
    x = tl.dot(below, tl.trans(vectors), input_precision="ieee")
    if BOUNDS:
        vectors = tl.load(at[:, None] + (DIM + channels)[None, :], mask=inside, other=0.0)
        x = tl.dot(tl.where(asked > 0.0, asked, 0.0).to(asked.dtype), tl.trans(vectors), x, input_precision="ieee")
    x = tl.where(there[None, :], x, float("-inf"))
    x = tl.max(tl.reshape(x, (ROWS * GROUPS, BLOCKS, SUBS)), 2)

    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    if SHARED:
        member = tl.arange(0, ROWS * GROUPS) % GROUPS
        x = tl.reshape(tl.where((member < GROUP)[:, None], x, float("-inf") if BOUNDS else 0.0), (ROWS, GROUPS, BLOCKS))
        x = tl.max(x, 1) if BOUNDS else tl.sum(x, 1) / GROUP
        token = tl.arange(0, ROWS)
        row = (batch * heads + kv_head) * tokens + token
        valid = token < tokens
    else:
        row = (batch * heads + kv_head * GROUP + member) * tokens + token
    tl.store(
        out + row.to(tl.int64)[:, None] * blocks + block[None, :], x, mask=valid[:, None] & (block < blocks)[None, :]
    )


def reject(q: Tensor, summary: Tensor, subs: int, share: str) -> str | None:
    """Why the kernel does not compute these scores, or None."""
    if 0 in (q.numel(), summary.numel()):
        return "takes no empty tensors"
    if torch.is_grad_enabled() and (q.requires_grad or summary.requires_grad):
        return "computes no gradients"
    if summary.device != q.device:
        return "needs queries and summaries on one device"
    reason = reject_dtypes("queries and summaries", q, summary)
    if reason is not None:
        return reason
    vectors, dim = summary.shape[3:]
    if summary.stride()[2:] != (vectors * dim, dim, 1) or q.stride(-1) != 1:
        return "needs channels, and the entries of a head, that lie side by side"
    if dim > MOST:
        return f"takes at most {MOST} channels"
    if subs > SUBS:
        return f"takes at most {SUBS} sub-blocks of a block"
    group = triton.next_power_of_2(q.shape[1] // summary.shape[1])
    if group * triton.next_power_of_2(q.shape[2]) > QUERIES:
        return f"takes at most {QUERIES} queries of the heads of a KV head"
    return None


def run(q: Tensor, summary: Tensor, subs: int, share: str) -> Tensor:
    """`ops.score_pages`."""
    (rows, q_heads, tokens, dim), (kv_heads, entries, vectors) = q.shape, summary.shape[1:4]
    heads, blocks = q_heads if share == "q_head" else kv_heads, -(-entries // subs)
    out = torch.empty(rows, heads, tokens, blocks, dtype=torch.float32, device=q.device)
    group, wide = q_heads // kv_heads, triton.next_power_of_2(subs)
    groups = triton.next_power_of_2(group)
    queries = max(triton.next_power_of_2(tokens), LEAST // groups)
    some = max(LEAST, (ENTRIES if width_of(dim) * q.element_size() <= 256 else LEAST) // wide)
    with on(q.device):
        _kernel[(triton.cdiv(blocks, some), kv_heads, rows)](
            (q, *q.stride()[:3]),
            (summary, *summary.stride()[:2]),
            out,
            heads,
            tokens,
            entries,
            blocks,
            subs,
            GROUP=group,
            GROUPS=groups,
            ROWS=queries,
            DIM=dim,
            WIDTH=width_of(dim),
            BOUNDS=vectors == 2,
            BLOCKS=some,
            SUBS=wide,
            SHARED=share != "q_head",
        )
    if share != "all":
        return out
    return out.amax(1, keepdim=True) if vectors == 2 else out.mean(1, keepdim=True)
