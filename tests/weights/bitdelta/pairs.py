"""Bases, fine-tunes of them, and the fine-tune that a delta of one bit stands for, from its definition."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


MIXTURE = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _gpt2(**facts: Any) -> hf.PreTrainedModel:
    sizes = {"vocab_size": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**{**sizes, "bos_token_id": 1, "eos_token_id": None, **facts}))


FAMILIES: dict[str, Callable[..., hf.PreTrainedModel]] = {
    "llama": lambda **f: hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **f})),
    "qwen2, biases, tied": lambda **f: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**{**SIZES, "tie_word_embeddings": True, **f})
    ),
    "qwen3, norms of heads": lambda **f: hf.Qwen3ForCausalLM(hf.Qwen3Config(**{**SIZES, "head_dim": 16, **f})),
    "phi3, fused": lambda **f: hf.Phi3ForCausalLM(hf.Phi3Config(**{**SIZES, **f})),
    "gemma2, scaled embeddings": lambda **f: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**{**SIZES, "head_dim": 16, "query_pre_attn_scalar": 16, **f})
    ),
    "gpt2, weights turned round": _gpt2,
    "qwen3-moe, experts": lambda **f: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**{**SIZES, **MIXTURE, **f})),
    "mixtral, experts": lambda **f: hf.MixtralForCausalLM(hf.MixtralConfig(**{**SIZES, "num_local_experts": 4, **f})),
}


def make(family: str, seed: int = 0, **facts: Any) -> Any:
    """A model with weights that are far from neutral, the same for the same seed."""
    torch.manual_seed(seed)
    model = FAMILIES[family](**facts).eval()
    made = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=made)
            weight.copy_(noise * 0.7 / weight.shape[-1] ** 0.5 if weight.dim() > 1 else weight + 0.1 * noise)
    return model


def tune(base: Any, seed: int, vocabulary: int | None = None, but: tuple[str, ...] = ()) -> Any:
    """A fine-tune: every parameter moved a little, but those whose names hold one of `but`."""
    torch.manual_seed(seed)
    tuned = type(base)(type(base.config)(**base.config.to_dict())).eval()
    tuned.load_state_dict(base.state_dict())
    made = torch.Generator().manual_seed(seed)
    if vocabulary is not None:
        tuned.resize_token_embeddings(vocabulary, mean_resizing=False)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            noise = torch.randn(weight.shape, generator=made)
            if not any(part in name for part in but):
                weight.add_(0.3 * noise / weight.shape[-1] ** 0.5 if weight.dim() > 1 else 0.1 * noise)
    return tuned


@torch.no_grad()
def stands_for(base: Any, tuned: Any) -> Any:
    """The fine-tune with each matrix as the base's plus mean magnitude times sign of the difference."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    made = type(tuned)(tuned.config).eval()
    made.load_state_dict(tuned.state_dict())
    head = made.get_output_embeddings()
    for name, module in made.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head:
            before = base.get_submodule(name).weight
            moved = module.weight - before
            if moved.any():
                module.weight.copy_(before + moved.abs().mean() * torch.where(moved >= 0, 1.0, -1.0))
        elif "gate_up_proj" in module._parameters:
            for name_of, parts in (("gate_up_proj", 2), ("down_proj", 1)):
                weights, befores = getattr(module, name_of), getattr(base.get_submodule(name), name_of)
                for expert, before in zip(weights, befores, strict=True):
                    for after, part in zip(expert.chunk(parts), before.chunk(parts), strict=True):
                        moved = after - part
                        after.copy_(part + moved.abs().mean() * torch.where(moved >= 0, 1.0, -1.0))
    return made


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder
