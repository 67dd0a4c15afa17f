"""What comes out of each operation, without its numbers: shapes, dtypes and layout, as a compiler wants to know them.

Arguments and results are those of `ops.py`; results are new tensors of which nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .linear import PackedWeight, Tokens
from .reference.weigh import empty_out
from .types import Packed, Selection


def _width(x: Tensor | Packed) -> int:
    """Channels of keys or values."""
    return x.shape[3] if isinstance(x, Tensor) else x.payload.shape[3] * 8 // x.bits


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def attend(q: Tensor, k: Any, v: Tensor | Packed, *others: Any) -> Tensor:
    """Of `attend_blocks`, `attend_pages`, `attend_recent` and `step_recent`."""
    return empty_out(q, _width(v))


def attend_mass(
    q: Tensor, k: Tensor | Packed, v: Any, logits: Any, see: Any, turns: Any, selection: Selection, near: int
) -> tuple[Tensor, Tensor]:
    """Of the operation, like all that follow."""
    kv_heads = k.shape[1] if isinstance(k, Tensor) else k.payload.shape[1]
    _, _, count, chosen = selection.ids.shape
    mass = q.new_empty(q.shape[0], kv_heads, count, chosen * selection.block, dtype=_wide(q))
    return empty_out(q, _width(v)), mass


def attend_layer(q: Tensor, k: Tensor, v: Tensor, logits: Any, groups: Any) -> Tensor:
    """`[B, 1, Hq, Dv]`."""
    return q.new_empty(q.shape[0], 1, q.shape[1], v.shape[3])


def score_pages(q: Tensor, summary: Tensor, subs: int, share: str) -> Tensor:
    """`[B, Hs, N, M]`."""
    heads = {"kv_head": summary.shape[1], "q_head": q.shape[1], "all": 1}[share]
    return q.new_empty(q.shape[0], heads, q.shape[2], -(-summary.shape[2] // subs), dtype=_wide(q))


def score_antidiagonal(q: Tensor, k: Tensor | Packed, q_pos: Any, block: int, *others: Any) -> Tensor:
    """`[B, Hq, N, M]`."""
    stored = k.shape[2] if isinstance(k, Tensor) else k.payload.shape[2]
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2] // block, -(-stored // block), dtype=_wide(q))


def pick_blocks(scores: Tensor, low: Any, high: Any, sink: int, take: int | None, tau: Any, forced: int) -> Tensor:
    """`[B, Hs, N, K]`."""
    blocks = scores.shape[3]
    most = blocks
    if take is not None:
        most = torch.sym_min(blocks, sink + forced + take)  # type: ignore[no-untyped-call]
    return scores.new_empty(*scores.shape[:3], most, dtype=torch.int32)


def like_first(x: Tensor, *others: Any) -> Tensor:
    """Of `rotate` and `gated`."""
    return x.new_empty(x.shape)


def rotate_heads(q: Tensor, k: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Shapes of q and k."""
    return q.new_empty(q.shape), k.new_empty(k.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, early: bool, *others: Any) -> Tensor:
    """Shape of x."""
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype) if early else x.dtype)


def project(x: Tensor, weights: Sequence[Tensor], biases: Any) -> list[Tensor]:
    """`[R, N]` each."""
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


def project_gated(x: Tensor, gate: Tensor, up: Any) -> Tensor:
    """`[R, N]`."""
    return x.new_empty(x.shape[0], gate.shape[0])


def nothing(*arguments: Any) -> None:
    """Of what changes its arguments alone."""


def bring_blocks(k: Any, v: Any, host: Any, ids: Tensor, lengths: Any, pool: Tensor, *others: Any) -> Tensor:
    """`[B, Hkv, 1, K]`."""
    return ids.new_empty(*pool.shape[:2], 1, ids.shape[3])


def encode_kv(x: Tensor, bits: int) -> Packed:
    """`[B, H, T, D]`."""
    payload = x.new_empty(*x.shape[:3], x.shape[3] * bits // 8, dtype=torch.uint8)
    scale, zero = (x.new_empty(x.shape[:3], dtype=torch.float16) for _ in range(2))
    return Packed(payload, scale, zero, bits, x.dtype)


def decode_kv(x: Packed) -> Tensor:
    """`[B, H, S, D]`."""
    return x.payload.new_empty(*x.payload.shape[:3], _width(x), dtype=x.dtype)


def delta_linear(x: Any, base_out: Tensor, *others: Any) -> Tensor:
    """`[R, N]`."""
    return base_out.new_empty(base_out.shape)


def linear_with_delta(x: Tensor, weight: Tensor, *others: Any) -> Tensor:
    """`[R, N]`."""
    return x.new_empty(x.shape[0], weight.shape[0])


def linears_with_delta(x: Tensor, weights: Sequence[Tensor], *others: Any) -> list[Tensor]:
    """`[R, N]` each."""
    return [linear_with_delta(x, weight) for weight in weights]


def linear_of_rows(x: Tensor, weights: Any, scales: Any, table_of_row: Any, width: int) -> Tensor:
    """`[R, width]`."""
    return x.new_empty(x.shape[0], width)


def quantize_tokens(x: Tensor, *others: Any) -> Tokens:
    """Of `quantize_tokens` and `quantize_gated`."""
    scale, sums = (x.new_empty(x.shape[0], dtype=dtype) for dtype in (torch.float32, torch.int32))
    return Tokens(x.new_empty(x.shape, dtype=torch.int8), scale, sums)


def quantize_norm(x: Tensor, weight: Tensor, eps: float, offset: float, early: bool) -> tuple[Tensor, Tokens]:
    """`[M, K]`, and its tokens."""
    return rms_norm(x, weight, eps, offset, early), quantize_tokens(x)


def w4a8_linear(tokens: Tokens, weight: PackedWeight, bias: Any, dtype: torch.dtype) -> Tensor:
    """`[M, N]`."""
    return tokens.values.new_empty(tokens.values.shape[0], weight.scale.shape[0], dtype=dtype)


def w4a8_linears(tokens: Tokens, weights: Sequence[PackedWeight], biases: Any, dtype: torch.dtype) -> list[Tensor]:
    """`[M, N]` each."""
    return [w4a8_linear(tokens, weight, None, dtype) for weight in weights]


def w4a8_linears_of(x: Tensor, up: Any, weights: Sequence[PackedWeight], biases: Any) -> list[Tensor]:
    """`[M, N]` each."""
    return [x.new_empty(x.shape[0], weight.scale.shape[0]) for weight in weights]


def sort_experts(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order and places `[S]`, ends `[E]`."""
    order, places = (ids.new_empty(ids.shape[0], dtype=torch.int32) for _ in range(2))
    return order, places, ids.new_empty(experts, dtype=torch.int32)


def w4a8_experts(tokens: Tokens, weight: Any, by: Any, times: int, dtype: torch.dtype) -> Tensor:
    """`[S, N]`."""
    return tokens.values.new_empty(by.order.shape[0], weight.scale.shape[1], dtype=dtype)


def combine_experts(rows: Tensor, by: Any, weights: Tensor) -> Tensor:
    """`[T, H]`."""
    return rows.new_empty(weights.shape[0], rows.shape[1])
