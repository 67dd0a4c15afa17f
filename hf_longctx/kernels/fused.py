"""Attention through torch's own fused kernels (`scaled_dot_product_attention`), where they can express it."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.functional import scaled_dot_product_attention

from . import antidiagonals, banded, products
from .dispatch import Implementation
from .reference import recent as recently
from .reference.attend import blocks, take_columns, values_of
from .reference.weigh import empty_out, join, positions, visible
from .types import Logits, Packed, Selection, Turns, Visibility


def reject(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None,
) -> str | None:
    """Why the fused kernels do not take these arguments, or None."""
    if selection is not None:
        return "cannot read selected blocks"
    if turns is not None:
        return "cannot turn queries to keys at lap positions"
    if not logits.plain:
        return "has no softcap, learned sinks or ALiBi"
    return None


def attend_blocks(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> Tensor:
    """`ops.attend_blocks`; causal attention in one call, a window in blocks of queries, with gradients all at once.

    So are queries that follow keys where flash attention takes them: elsewhere torch would make a mask of T * S.
    """
    k, v = values_of(k), values_of(v)
    stored, tokens = k.shape[2], q.shape[2]
    if torch.is_grad_enabled() and see.window is not None and banded.fits(see, tokens, stored):
        edge = banded.edge_of(see.sink, see.window)
        first = attend_pages(q[:, :, :edge], k[:, :, :edge], v[:, :, :edge], logits, see, None)
        beyond = banded.attend_beyond(q, k, v, logits.scale, see.sink, see.window)
        return torch.cat((first, beyond), 2)
    unbounded = see.window is None or see.window >= stored
    grouped = q.shape[1] != k.shape[1]
    if see.aligned and unbounded and stored == tokens:
        return scaled_dot_product_attention(q, k, v, is_causal=tokens > 1, scale=logits.scale, enable_gqa=grouped)
    if see.aligned and unbounded and stored > tokens and _flashes(q, k, v, grouped):
        # causal means here that the last query stands at the last key, as torch.nn.attention.bias says it
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return cast("Tensor", flash(q, k, v, 0.0, True, scale=logits.scale)[0])
    parts = (
        (rows, attend_pages(q[:, :, rows], take_columns(k, cols), take_columns(v, cols), logits, part, None))
        for rows, cols, part, _ in blocks(q, k, see, None)
    )
    return join(parts, empty_out(q, v.shape[3]))


def _flashes(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> bool:
    """True if torch's flash attention takes them, adds no channels, and was seen to begin where the keys end."""
    if not q.is_cuda or torch.version.hip is not None or q.shape[3] % 8:
        return False
    return bool(can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, grouped)))


def attend_pages(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> Tensor:
    """`ops.attend_pages`."""
    k, v = values_of(k), values_of(v)
    rows, heads, tokens, dim = q.shape
    stored = k.shape[2]
    if see.aligned and tokens == 1 and (see.window is None or see.window >= stored):
        packed = q.reshape(rows, k.shape[1], -1, dim)  # keys are not repeated
        return scaled_dot_product_attention(packed, k, v, scale=logits.scale).reshape(rows, heads, tokens, v.shape[-1])
    return _masked(q, k, v, visible(see, *positions(see, tokens, stored, q.device)), logits.scale)


def reject_recent(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    near_k: Tensor,
    near_v: Tensor,
    logits: Logits,
    see: Visibility,
    near_pos: Tensor | None,
    recent: int,
) -> str | None:
    """Why the fused kernels do not take these arguments, or None."""
    return None if logits.plain else "has no softcap, learned sinks or ALiBi"


def attend_recent(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    near_k: Tensor,
    near_v: Tensor,
    logits: Logits,
    see: Visibility,
    near_pos: Tensor | None,
    recent: int,
) -> Tensor:
    """`ops.attend_recent`, in blocks of queries."""

    def read(part: recently.Part) -> Tensor:
        return _masked(q[:, :, part.rows], part.k, part.v, part.seen, logits.scale)

    found = recently.parts(q, k, v, near_k, near_v, see, near_pos, recent)
    return join(((part.rows, read(part)) for part in found), empty_out(q, v.shape[3]))


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attention where `seen` `[B or 1, T, S]` is true; zero where a query sees nothing.

    The G query heads of a KV head stand side by side as queries, so keys are not repeated.
    """
    rows, heads, tokens, dim = q.shape
    mask = seen.repeat(1, heads // k.shape[1], 1)[:, None]
    packed = q.reshape(rows, k.shape[1], -1, dim)
    out = scaled_dot_product_attention(packed, k, v, attn_mask=mask, scale=scale)
    blind = ~mask.any(-1, keepdim=True)  # some kernels give NaN to a query that sees nothing
    return out.masked_fill(blind, 0.0).reshape(rows, heads, tokens, v.shape[-1])


OPS = {
    "attend_recent": Implementation(attend_recent, reject_recent),
    "attend_blocks": Implementation(attend_blocks, reject),
    "attend_pages": Implementation(attend_pages, reject),
    "score_antidiagonal": Implementation(antidiagonals.score_antidiagonal, antidiagonals.reject),
    "w4a8_linear": Implementation(products.w4a8_linear, products.reject),
    "w4a8_linears": Implementation(products.w4a8_linears, products.reject_all),
    "w4a8_linears_of": Implementation(products.w4a8_linears_of, products.reject_of),
    "w4a8_experts": Implementation(products.w4a8_experts, products.reject_experts),
}
