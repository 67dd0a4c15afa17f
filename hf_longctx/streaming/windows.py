"""Attention of a vision tower within windows of one size: all of them in one call, not one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "hf_longctx_windows"
"""The name under which it is registered with transformers, while a tower is recorded."""

_NUMBER: ContextVar[int] = ContextVar("hf_longctx_windows", default=1)
_LENGTHS = "cu_seqlens"


@contextmanager
def at_once(config: Any, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments for a layer of a tower that attends to windows of one size: it takes them for one, and they are not.

    Args:
        config: of the tower.
        kwargs: of a layer's call. Where they name no such windows, or attention is not torch's own, they stay.
    """
    ends = kwargs.get(_LENGTHS)
    sizes = set() if ends is None else {last - first for first, last in pairwise(ends.tolist())}
    if len(sizes) != 1 or ends is None or len(ends) < 3 or config._attn_implementation != "sdpa":
        yield kwargs
        return
    AttentionInterface.register(NAME, attention)
    before, token = config._attn_implementation_internal, _NUMBER.set(len(ends) - 1)
    config._attn_implementation_internal = NAME
    try:
        yield {**kwargs, _LENGTHS: torch.stack((ends[0], ends[-1]))}
    finally:
        config._attn_implementation_internal = before
        _NUMBER.reset(token)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each window to itself.

    Args:
        module: not read.
        query: `[1, H, T, D]`, windows of one size one after the other.
        key: likewise.
        value: likewise.
        attention_mask: None.
        scaling: factor of the logits.
        dropout: 0, as nothing trains here.
        **kwargs: what else the model says, which changes nothing within a window.

    Returns:
        `[1, T, H, D]` and None.
    """
    heads, tokens, dim = query.shape[1:]
    windows = _NUMBER.get()
    q, k, v = (x[0].view(heads, windows, -1, dim).transpose(0, 1) for x in (query, key, value))
    out = scaled_dot_product_attention(q, k, v, scale=scaling)
    return out.transpose(1, 2).reshape(1, tokens, heads, dim), None
