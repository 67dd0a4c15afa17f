"""Which shipped pattern belongs to a model: by its name, and by the facts of its configuration.

A checkpoint that was renamed, or copied to a folder of any name, is found by its facts; one whose vocabulary was
resized by its name. A relative that differs in none of the facts below (for example Llama 3.1 8B itself, the base of
the Instruct model) cannot be told apart and gets the same pattern; the pattern's name says whose it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .pattern import HeadPattern
from .pattern_io import load_pattern, shipped_name

_Facts = Mapping[str, object]

# Shapes alone do not identify a model: five of the published seven have the same one.
_SHAPE = ("model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
_LLAMA2: _Facts = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_size": 4096,
    "vocab_size": 32000,
}
_LLAMA3: _Facts = {**_LLAMA2, "num_key_value_heads": 8, "vocab_size": 128256}
_MISTRAL: _Facts = {
    **_LLAMA2,
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": None,
    "rope_theta": 1e6,
    "rope_type": "default",
}

_KNOWN: Mapping[str, _Facts] = {
    "Llama-2-7B-32K-Instruct": {
        **_LLAMA2,
        "max_position_embeddings": 32768,
        "rope_theta": 1e4,
        "rope_type": "linear",
        "factor": 8.0,
    },
    "Llama-3-8B-Instruct-Gradient-1048k": {
        **_LLAMA3,
        "max_position_embeddings": 1048576,
        "rope_theta": 3580165449.0,
        "rope_type": "default",
    },
    # Its rope_theta is published only as the rounded 45.2e9; the length alone tells it from every relative.
    "Llama-3-8B-Instruct-Gradient-4194k": {**_LLAMA3, "max_position_embeddings": 4194304, "rope_type": "default"},
    "Meta-Llama-3.1-8B-Instruct": {
        **_LLAMA3,
        "max_position_embeddings": 131072,
        "rope_theta": 5e5,
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "Mistral-7B-Instruct-v0.2": _MISTRAL,
    "Mistral-7B-Instruct-v0.3": {**_MISTRAL, "vocab_size": 32768},
    "Mixtral-8x7B-Instruct-v0.1": {
        **_MISTRAL,
        "model_type": "mixtral",
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "SmolLM2-135M-Instruct": {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_theta": 1e5,
        "rope_type": "default",
    },
}


def find_pattern(config: Any, name_or_path: str | None = None) -> HeadPattern | None:
    """Find the shipped pattern of a model.

    A known name decides, if the model has the shape of the one so called (type, layers, heads, KV heads, hidden size);
    otherwise all facts of one published configuration must agree: besides the shape the vocabulary, the positions and
    the rotary parameters, and the sliding window and experts where there are any.

    Args:
        config: The configuration of a loaded model, of transformers 5 or older; of a vision-language model the text's
            is read.
        name_or_path: The model's name, hub id or path; `config._name_or_path` is looked at too.

    Returns:
        The pattern, or None if the model is not known.
    """
    facts = _facts(config)
    for name in (name_or_path, getattr(config, "_name_or_path", None)):
        shipped = shipped_name(name) if isinstance(name, str) else None
        if shipped is not None and all(facts.get(key) == _KNOWN[shipped][key] for key in _SHAPE):
            return load_pattern(shipped)
    matches = [name for name, known in _KNOWN.items() if all(facts.get(key) == value for key, value in known.items())]
    return load_pattern(matches[0]) if len(matches) == 1 else None


def _facts(config: Any) -> _Facts:
    """Collect what fingerprints are made of; old configurations keep the rotary parameters elsewhere."""
    get_text_config = getattr(config, "get_text_config", None)
    text = get_text_config(decoder=True) if callable(get_text_config) else config
    keys = {key for known in _KNOWN.values() for key in known}
    facts: dict[str, object] = {key: _read(text, key) for key in keys}
    if facts["num_key_value_heads"] is None:
        facts["num_key_value_heads"] = facts["num_attention_heads"]
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if isinstance(rope, Mapping):
        facts.update({key: value for key, value in rope.items() if key in keys})
        facts["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    return facts


def _read(config: Any, key: str) -> object:
    """A fact; None where there is none, or not one for all layers, which transformers then refuses to say."""
    try:
        return getattr(config, key, None)
    except RuntimeError:
        return None
