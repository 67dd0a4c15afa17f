"""Which shipped pattern belongs to a model: real configurations of all seven, and near misses."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlavaConfig, MistralConfig, MixtralConfig, PreTrainedConfig, Qwen2Config

from hf_longctx import heads

LLAMA31_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama2(**changes: Any) -> LlamaConfig:
    facts = {"vocab_size": 32000, "max_position_embeddings": 32768, "rope_scaling": {"type": "linear", "factor": 8.0}}
    return LlamaConfig(**{**facts, **changes})


def llama3(**changes: Any) -> LlamaConfig:
    facts = {
        "vocab_size": 128256,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
    }
    return LlamaConfig(**{**facts, "rope_theta": 500000.0, **changes})


def llama31(**changes: Any) -> LlamaConfig:
    return llama3(**{"max_position_embeddings": 131072, "rope_scaling": dict(LLAMA31_ROPE), **changes})


def mistral(**changes: Any) -> MistralConfig:
    facts = {"vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None}
    return MistralConfig(**{**facts, **changes})


def mixtral(**changes: Any) -> MixtralConfig:
    facts = {"vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 1e6, "sliding_window": None}
    return MixtralConfig(**{**facts, "num_local_experts": 8, "num_experts_per_tok": 2, **changes})


PUBLISHED = {
    "Llama-2-7B-32K-Instruct": llama2(),
    "Llama-3-8B-Instruct-Gradient-1048k": llama3(max_position_embeddings=1048576, rope_theta=3580165449.0),
    "Llama-3-8B-Instruct-Gradient-4194k": llama3(max_position_embeddings=4194304, rope_theta=45.2e9),
    "Meta-Llama-3.1-8B-Instruct": llama31(),
    "Mistral-7B-Instruct-v0.2": mistral(),
    "Mistral-7B-Instruct-v0.3": mistral(vocab_size=32768),
    "Mixtral-8x7B-Instruct-v0.1": mixtral(),
}
NEAR_MISSES = {
    "Llama-2-7b-chat": llama2(max_position_embeddings=4096, rope_scaling=None),
    "Llama-2-7B-32K with padded vocabulary": llama2(vocab_size=32001),
    "Llama-3-8B-Instruct": llama3(),
    "Llama-3-8B-Instruct-262k": llama3(max_position_embeddings=262144, rope_theta=283461213.0),
    "Llama-3.1-8B with more tokens": llama31(vocab_size=128258),
    "Llama-3.1-70B": llama31(num_hidden_layers=80, hidden_size=8192, num_attention_heads=64),
    "Llama-3.1-8B with another factor": llama31(rope_scaling={**LLAMA31_ROPE, "factor": 32.0}),
    "Mistral-7B-Instruct-v0.1": mistral(rope_theta=1e4, sliding_window=4096),
    "Mistral-7B with theta 1e4": mistral(rope_theta=1e4),
    "Mixtral-8x22B": mixtral(hidden_size=6144, num_attention_heads=48, num_hidden_layers=56),
    "four experts": mixtral(num_local_experts=4),
    "Qwen2 of the same sizes": Qwen2Config(vocab_size=32000, max_position_embeddings=32768, rope_theta=1e6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration_is_found_without_a_name(name: str, tmp_path: Path) -> None:
    found = heads.find_pattern(PUBLISHED[name])
    assert found is not None
    assert found.name == name
    PUBLISHED[name].save_pretrained(tmp_path)
    loaded = type(PUBLISHED[name]).from_pretrained(tmp_path)
    assert heads.find_pattern(loaded) == found


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss_is_not_found(name: str) -> None:
    assert heads.find_pattern(NEAR_MISSES[name], "some/model") is None


def test_name_decides_when_facts_were_changed() -> None:
    config = mistral(vocab_size=32005)
    assert heads.find_pattern(config) is None
    found = heads.find_pattern(config, "mistralai/Mistral-7B-Instruct-v0.3")
    assert found is not None
    assert found.name == "Mistral-7B-Instruct-v0.3"
    config._name_or_path = "/cache/models--mistralai--Mistral-7B-Instruct-v0.2/snapshots/0123abcd"
    assert heads.find_pattern(config) == heads.load_pattern("Mistral-7B-Instruct-v0.2")


def test_name_wins_over_facts_and_todays_hub_name_is_known() -> None:
    found = heads.find_pattern(PUBLISHED["Mistral-7B-Instruct-v0.2"], "Mistral-7B-Instruct-v0.3")
    assert found is not None
    assert found.name == "Mistral-7B-Instruct-v0.3"
    found = heads.find_pattern(llama31(vocab_size=128257), "meta-llama/Llama-3.1-8B-Instruct")
    assert found is not None
    assert found.name == "Meta-Llama-3.1-8B-Instruct"


def test_name_does_not_help_a_model_of_another_shape() -> None:
    tiny = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    assert heads.find_pattern(tiny, "meta-llama/Meta-Llama-3.1-8B-Instruct") is None
    assert heads.find_pattern(llama31(), "Mistral-7B-Instruct-v0.2").name == "Meta-Llama-3.1-8B-Instruct"  # type: ignore[union-attr]


def test_text_side_of_a_vision_model_and_old_style_configurations_are_read() -> None:
    vision = LlavaConfig(text_config=copy.deepcopy(PUBLISHED["Mistral-7B-Instruct-v0.2"]))
    assert heads.find_pattern(vision) == heads.load_pattern("Mistral-7B-Instruct-v0.2")

    class Old:
        model_type, num_hidden_layers, num_attention_heads, num_key_value_heads = "llama", 32, 32, None
        hidden_size, vocab_size, max_position_embeddings, rope_theta = 4096, 32000, 32768, 10000.0
        rope_scaling = {"type": "linear", "factor": 8.0}  # noqa: RUF012

    assert heads.find_pattern(Old()) == heads.load_pattern("Llama-2-7B-32K-Instruct")
    assert heads.find_pattern(PreTrainedConfig()) is None
