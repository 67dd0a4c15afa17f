"""Tiny models, and how a patched one is run call by call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


def tiny_llama(seed: int = 0, **facts: Any) -> LlamaForCausalLM:
    """A random Llama in float32 whose attention is far from uniform, so that a wrong position or mask shows.

    Args:
        seed: of the weights.
        **facts: for its `LlamaConfig`, in place of two layers, four query and two KV heads of eight channels.
    """
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    }
    made = torch.Generator().manual_seed(seed)
    model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**{**sizes, **facts}))
    model.train(False)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=made)
            weight.copy_(noise * 1.5 / weight.shape[-1] ** 0.5 if weight.dim() > 1 else 1 + 0.2 * noise)
        embeddings: Any = model.get_input_embeddings()
        embeddings.weight.mul_(weight.shape[-1] ** 0.5)
    return model


@torch.no_grad()
def feed(
    model: PreTrainedModel,
    input_ids: Tensor,
    calls: Sequence[int],
    attention_mask: Tensor | None = None,
    rooms: Mapping[int, int] | None = None,
) -> tuple[Tensor, Any]:
    """Run a patched model call by call on one cache; arguments as `oracle_logits`. Gives `[B, C, V]` and the cache."""
    out, cache, start = [], None, 0
    for number, columns in enumerate(calls):
        if rooms and number in rooms:
            assert cache is not None
            cache.evict(rooms[number])
        seen = None if attention_mask is None else attention_mask[:, : start + columns]
        result: Any = model(
            input_ids[:, start : start + columns], attention_mask=seen, past_key_values=cache, use_cache=True
        )
        out.append(result.logits)
        cache, start = result.past_key_values, start + columns
    return torch.cat(out, 1), cache


def rounding(model: PreTrainedModel, keys: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative error that `dtype` may add from tokens to logits: half an ulp for every term of every sum on the way.

    Args:
        model: the sums run over the inputs of its linear layers, its head channels and the visible keys.
        keys: most keys that a query sees.
        dtype: of the computation.
    """
    config: Any = model.config.get_text_config(decoder=True)
    linear = sum(m.weight.shape[-1] for m in model.modules() if isinstance(m, torch.nn.Linear))
    attention = config.num_hidden_layers * (keys + 2 * config.hidden_size // config.num_attention_heads)
    return float(torch.finfo(dtype).eps / 2 * (linear + attention))
