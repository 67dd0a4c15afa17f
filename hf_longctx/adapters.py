"""Attention of families that do not go through transformers' attention interface: project, rotate, hand over."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .attention import attention
from .context import current
from .errors import UnsupportedError


def falcon_forward(
    module: Any,
    hidden_states: Tensor,
    alibi: Tensor | None = None,
    layer_past: Any = None,
    cache: Any = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Falcon, with its KV heads as they are: the stock module copies them to every query head before it caches them.

    Args:
        module: the `FalconAttention` in whose place this runs.
        hidden_states: `[B, T, hidden]`.
        alibi: given for the ALiBi variant, where logits are biased by slope * distance / sqrt(D).
        layer_past: the cache.
        cache: likewise, by its later name.
        position_embeddings: cos and sin, `[B, T, D]`.
        **kwargs: what else the block passes; none of it changes the result.
    """
    rows, tokens, _ = hidden_states.shape
    heads, kv_heads, dim = module.num_heads, module.num_kv_heads, module.head_dim
    fused = module.query_key_value(hidden_states)
    if module.new_decoder_architecture:
        parts = fused.view(rows, tokens, kv_heads, heads // kv_heads + 2, dim)
        q, k, v = parts[..., :-2, :].flatten(2, 3), parts[..., -2, :], parts[..., -1, :]
    elif module.multi_query:
        q, k, v = fused.view(rows, tokens, heads + 2, dim).split((heads, 1, 1), 2)
    else:
        q, k, v = fused.view(rows, tokens, heads, 3, dim).unbind(3)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    slopes = None
    if alibi is None:
        assert position_embeddings is not None
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
        q, k = rotate(q, k, *position_embeddings)
    else:
        build = sys.modules[type(module).__module__].build_alibi_tensor
        pair = build(torch.ones(1, 2, device=q.device, dtype=torch.long), heads, torch.float32)
        slopes = pair[:, 0, 1] * module.inv_norm_factor
    dropout = module.attention_dropout.p if module.training else 0.0
    out = _attend(module, q, k, v, layer_past if cache is None else cache, module.inv_norm_factor, dropout, slopes)
    return module.dense(out.reshape(rows, tokens, -1)), None


def mpt_forward(
    module: Any,
    hidden_states: Tensor,
    position_bias: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """MPT, whose ALiBi bias is counted over what is cached, as in the StreamingLLM paper.

    Args:
        module: the `MptAttention` in whose place this runs.
        hidden_states: `[B, T, hidden]`.
        position_bias: `[Hq, 1, max_seq_len]`, slope * (column - last column); only its slopes are read.
        past_key_values: the cache.
        cache: likewise, by its later name.
        attention_mask: not read; padding is in the step.
        **kwargs: what else the block passes; none of it changes the result.
    """
    rows, tokens, _ = hidden_states.shape
    fused = module.Wqkv(hidden_states)
    if module.clip_qkv:
        fused = fused.clamp(-module.clip_qkv, module.clip_qkv)
    q, k, v = (x.view(rows, tokens, module.n_heads, module.head_dim).transpose(1, 2) for x in fused.chunk(3, 2))
    slopes = -position_bias[:, 0, -2]
    dropout = module.attn_dropout_p if module.training else 0.0
    out = _attend(module, q, k, v, past_key_values if cache is None else cache, module.softmax_scale, dropout, slopes)
    return module.out_proj(out.reshape(rows, tokens, -1)), None


def _attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, cache: Any, scale: float, dropout: float, slopes: Tensor | None
) -> Tensor:
    graphed = torch.compiler.is_compiling()  # where a graph finds its call when it runs
    forward = None if graphed else current()
    if forward is None and not graphed:
        raise UnsupportedError(
            f"hf_longctx: expected {type(module).__name__} to run inside its patched model; got a call from elsewhere "
            "(gradient checkpointing runs layers again). Turn gradient checkpointing off, or call the whole model."
        )
    if cache is not None:
        k, v = cache.update(k, v, module.layer_idx)
    return attention(module, q, k, v, None, scale, dropout, forward, slopes=slopes)[0]


FORWARDS: dict[str, Callable[..., tuple[Tensor, None]]] = {"falcon": falcon_forward, "mpt": mpt_forward}
"""The adapted `forward` of an attention module, by family."""


def install(module: nn.Module, family: str) -> None:
    """Put the family's adapted `forward` in the instance's place, beneath any hook of accelerate's."""
    name = "_old_forward" if hasattr(module, "_old_forward") else "forward"
    setattr(module, name, partial(FORWARDS[family], module))


def remove(module: nn.Module) -> None:
    """Give the module its class's `forward` back."""
    name = "_old_forward"
    if hasattr(module, name):
        setattr(module, name, MethodType(type(module).forward, module))
    else:
        module.__dict__.pop("forward", None)
