"""Attention that is trained, on a GPU: FlexAttention over the blocks of keys that are read, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import banded
from .dispatch import Implementation
from .reference.attend import values_of
from .reference.weigh import positions
from .types import Logits, Packed, Selection, Turns, Visibility

BLOCK = 128
"""Keys, and queries, that are read or left out together where nothing was chosen."""

DIMS = (16, 32, 64, 128, 256)

MOST_VARIANTS = 1024
"""Variants that torch may compile, where its own limit is 8: past the limit it would compute all scores."""


def reject(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None,
) -> str | None:
    """Why FlexAttention does not take these arguments, or None."""
    if q.device.type != "cuda":
        return "trains on CUDA devices only"
    if not (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in (q, k, v))):
        return "is for gradients"
    if turns is not None:
        return "cannot turn queries to keys at lap positions"
    if not logits.plain:
        return "has no softcap, learned sinks or ALiBi"
    if q.shape[3] not in DIMS or v.shape[3] not in DIMS:
        return f"takes {', '.join(map(str, DIMS))} channels"
    if selection is None:
        whole = see.aligned and q.shape[2] == k.shape[2] and (see.window is None or see.window >= k.shape[2])
        if whole or banded.fits(see, q.shape[2], k.shape[2]):
            return "leaves plain causal attention, and windows without padding, to torch"
        return _without()
    if selection.pages is not None:
        return "reads blocks where they lie in the text"
    if selection.block % BLOCK or selection.q_block % BLOCK:
        return f"takes blocks of a multiple of {BLOCK} queries and keys"
    return _without()


@cache
def _without() -> str | None:
    """Why nothing can be compiled here."""
    from torch.utils._triton import has_triton

    return None if has_triton() else "needs triton"


@cache
def _attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True)


def attend_blocks(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> Tensor:
    """`ops.attend_blocks`, with gradients; nothing of size T * S is held.

    Source: FlexAttention, torch.nn.attention.flex_attention.
    """
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import BlockMask

    k, v = values_of(k), values_of(v)
    tokens, stored = q.shape[2], k.shape[2]
    q_pos, k_pos = positions(see, tokens, stored, q.device)
    if selection is None:
        sizes = (BLOCK, BLOCK)
        some, whole = seen_blocks(see, q_pos, k_pos)
    else:
        sizes = (selection.q_block, selection.block)
        see = Visibility(q_pos=see.q_pos, k_pos=see.k_pos)
        some, whole = chosen_blocks(selection, see, q_pos, stored, q.shape[1])
    blocks = BlockMask.from_kv_blocks(
        *_listed(some),
        *_listed(whole),
        BLOCK_SIZE=sizes,
        mask_mod=_mask(see, q_pos, k_pos),
        seq_lengths=(tokens, stored),
    )
    grouped = q.shape[1] != k.shape[1]
    with config.patch(recompile_limit=MOST_VARIANTS):
        out: Tensor = _attention()(q, k, v, block_mask=blocks, scale=logits.scale, enable_gqa=grouped)
    return out


def _mask(see: Visibility, q_pos: Tensor, k_pos: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """`Visibility` for single tokens, given their rows, heads and places."""
    several, keys, sink, window = q_pos.shape[0] > 1, k_pos.shape[0] > 1, see.sink, see.window or 0

    def causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at, place = q_pos[row if several else 0, query], k_pos[row if keys else 0, key]
        return (place >= 0) & (place <= at)

    def windowed(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at, place = q_pos[row if several else 0, query], k_pos[row if keys else 0, key]
        return (place >= 0) & (place <= at) & ((place < sink) | (place > at - window))

    return causal if see.window is None else windowed


def seen_blocks(see: Visibility, q_pos: Tensor, k_pos: Tensor) -> tuple[Tensor, Tensor]:
    """Which blocks of keys some query of a block sees in part, and which all of its queries see as a whole.

    Args:
        see: sink and window.
        q_pos: `[B or 1, T]`, int64, -1 for no query.
        k_pos: `[B or 1, S]`, int64, -1 for no key.

    Returns:
        Two of `[B or 1, 1, N, M]`, bool, never both true. The first may name a block of which nothing is seen.
    """
    (q_low, q_high), (k_low, k_high) = ((low[:, None], high[:, None]) for low, high in map(_bounds, (q_pos, k_pos)))
    q_low, q_high, k_low, k_high = q_low[..., None], q_high[..., None], k_low[:, :, None], k_high[:, :, None]
    some = (k_high >= 0) & (q_high >= 0) & (k_low.clamp(min=0) <= q_high)
    whole = (k_low >= 0) & (q_low >= 0) & (k_high <= q_low)
    if see.window is not None:
        first = q_low.clamp(min=0) - see.window  # the last position that is too far away for the first query
        some &= (k_low.clamp(min=0) < see.sink) | (k_high > first)
        whole &= (k_high < see.sink) | (q_high - k_low < see.window)
    return _apart(some, whole, q_pos.shape[1] % BLOCK > 0, k_pos.shape[1] % BLOCK > 0)


def _apart(some: Tensor, whole: Tensor, short_queries: bool, short_keys: bool) -> tuple[Tensor, Tensor]:
    """Blocks in part and as a whole; the last one of queries, or of keys, is none where it is short."""
    whole = whole & some
    if short_queries:
        whole[:, :, -1] = False
    if short_keys:
        whole[..., -1] = False
    return some & ~whole, whole


def _bounds(pos: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest position of each block, `[B or 1, blocks]`; of the places after the last one none."""
    missing = -pos.shape[1] % BLOCK
    last = pos[:, -1:]
    blocks = torch.unflatten(torch.cat((pos, last.expand(-1, missing)), 1), 1, (-1, BLOCK))
    return blocks.amin(-1), blocks.amax(-1)


def chosen_blocks(
    selection: Selection, see: Visibility, q_pos: Tensor, stored: int, heads: int
) -> tuple[Tensor, Tensor]:
    """The same of what was chosen, `[B, Hq, N, M]`; a block as a whole where columns are positions.

    Args:
        selection: of blocks.
        see: whether columns are positions.
        q_pos: `[B or 1, T]`, int64.
        stored: S.
        heads: Hq.
    """
    count, (rows, shared, n, _) = -(-stored // selection.block), selection.ids.shape
    chosen = torch.zeros(rows, shared, n, count + 1, dtype=torch.bool, device=q_pos.device)
    chosen.scatter_(3, torch.where(selection.ids < 0, count, selection.ids).long(), True)
    chosen = chosen[..., :count].repeat_interleave(heads // shared, 1)
    lasts = torch.arange(1, count + 1, device=q_pos.device) * selection.block - 1
    before = (lasts <= q_pos[0, :: selection.q_block, None]) & see.aligned
    short = q_pos.shape[1] % selection.q_block > 0
    return _apart(chosen, before[None, None], short, stored % selection.block > 0)


def _listed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row of `[..., M]` how many are true, and where, the false ones after them; int32."""
    return mask.sum(-1, dtype=torch.int32), mask.byte().argsort(stable=True, dim=-1, descending=True).int()


OPS = {"attend_blocks": Implementation(attend_blocks, reject)}
