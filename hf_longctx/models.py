"""Facts about a loaded model that a plan needs, read from its configuration, and what differs by family."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .errors import UnsupportedError
from .machine import device_name
from .shards import find_shard

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What transformers calls a cache among arguments and in outputs: `cache` from 5.24 on."""


@dataclass(frozen=True)
class LayerFacts:
    """One attention layer.

    Args:
        q_heads, kv_heads: numbers of heads.
        head_dim: channels of a key.
        window: the model's own sliding window, in tokens, the query included; None for full attention, or a window that
            spans every position the model has (`spans_all`).
    """

    q_heads: int
    kv_heads: int
    head_dim: int
    window: int | None


@dataclass(frozen=True)
class VisionFacts:
    """How a vision-language model takes the pictures of a round.

    Args:
        family: `config.model_type` of the whole model.
        pictures: they go into its processor as one `video`, or as an `image` each.
        axes: numbers in a position: 3 (time, height, width) by the model's `get_rope_index`, or 1.
    """

    family: str
    pictures: Literal["video", "image"]
    axes: int


@dataclass(frozen=True)
class ModelFacts:
    """What a method may know of a model.

    Args:
        family: `config.model_type` of the text model.
        name: the model's name or path, for messages and the search of a head pattern.
        config: the text model's configuration.
        layers: one entry per layer.
        longest_in_cache: most tokens at which the rotary frequencies stay as they are, None for no bound.
        not_in_cache: why positions cannot be counted in the cache, or None.
        device: name of the device that the model begins on.
        dtype: of the weights, such as `bfloat16`.
        has_sinks: its softmax has learned sinks already.
        place: the device itself.
        vision: how it takes pictures, if it is a vision-language model that sessions know.
        rank: under tensor parallelism: which part of the heads this process has; `layers` says what the whole has.
        ranks: parts that there are.
        places: the device of each layer, where `device_map` spreads them over several; empty where they are on one.
    """

    family: str
    name: str
    config: Any
    layers: tuple[LayerFacts, ...]
    longest_in_cache: int | None
    not_in_cache: str | None
    device: str
    dtype: str
    has_sinks: bool
    place: torch.device
    vision: VisionFacts | None = None
    rank: int = 0
    ranks: int = 1
    places: tuple[torch.device, ...] = ()


def inspect_model(model: PreTrainedModel) -> ModelFacts:
    """The facts of a loaded decoder.

    Raises:
        UnsupportedError: attention that cannot be adapted; names the family and why.
    """
    decoder, base = decoder_of(model)
    config = decoder.config
    family = config.model_type
    reason = _refusal(config) or _refusal_of_modules(decoder, family)
    if reason:
        raise UnsupportedError(
            f"hf_longctx: expected a decoder whose attention can be adapted; got '{family}', which {reason}. "
            "Use the model as it is."
        )
    windows = _windows(config)
    modules = attention_modules(decoder)
    found = [int(module.layer_idx) for module in modules]
    if found != list(range(len(windows))):
        raise UnsupportedError(
            f"hf_longctx: expected one attention module for each of the {len(windows)} layers of '{family}'; got "
            f"layers {found}. Use the model as it is."
        )
    layers = tuple(_layer(config, *each) for each in zip(modules, windows, strict=True))
    longest, reason = _in_cache_limits(config, family)
    name = str(getattr(model.config, "_name_or_path", "") or "")
    dtype, place = str(decoder.dtype).removeprefix("torch."), decoder.device
    has_sinks = any(isinstance(getattr(module, "sinks", None), nn.Parameter) for module in modules)
    vision, device = VISION.get(base.config.model_type), device_name(place)
    shard = find_shard(base, modules, gcd(*(x.q_heads for x in layers)), gcd(*(x.kv_heads for x in layers)))
    places = tuple(next(module.parameters()).device for module in modules)
    places = () if len(set(places)) == 1 or any(x.type == "meta" for x in places) else places
    return ModelFacts(
        family, name, config, layers, longest, reason, device, dtype, has_sinks, place, vision, *shard, places
    )


def decoder_of(model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The text decoder inside a model (of a PEFT model: inside its base model), and the model without PEFT.

    Raises:
        UnsupportedError: not a transformers model, or it has no decoder.
    """
    base: Any = model
    if hasattr(base, "get_base_model"):
        if base.active_peft_config.is_prompt_learning:
            raise UnsupportedError(
                "hf_longctx: expected a PEFT model that leaves the cache alone; got prompt learning, which fills it "
                "beforehand. Use LoRA or another adapter of weights."
            )
        base = base.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"hf_longctx: expected a loaded transformers model; got {type(base).__name__}. "
            "Load one with AutoModelForCausalLM.from_pretrained()."
        )
    decoder: Any = base.get_decoder()  # type: ignore[no-untyped-call]
    if not isinstance(decoder, PreTrainedModel):
        raise UnsupportedError(
            f"hf_longctx: expected a model with a text decoder; got '{base.config.model_type}', whose decoder is "
            f"{type(decoder).__name__}. Use the model as it is."
        )
    return decoder, base


def attention_modules(decoder: nn.Module) -> list[Any]:
    """Its self-attention modules, by layer: those with a layer index and a cache argument, no such module inside."""

    def attends(module: nn.Module) -> bool:
        if not isinstance(getattr(module, "layer_idx", None), int):
            return False
        return bool({CACHE, "past_key_values", "layer_past"} & set(inspect.signature(module.forward).parameters))

    found = [module for module in decoder.modules() if attends(module)]
    inner: list[Any] = [m for m in found if not any(attends(child) for child in m.modules() if child is not m)]
    return sorted(inner, key=lambda module: int(module.layer_idx))


def _refusal(config: Any) -> str | None:
    """Why a configuration cannot be adapted, as the end of a sentence, or None."""
    if getattr(config, "is_encoder_decoder", False):
        return "is an encoder-decoder"
    if getattr(config, "is_causal", True) is False:
        return "attends in both directions"
    if getattr(config, "kv_lora_rank", None):
        return "has multi-latent attention (MLA), whose cache holds latents instead of keys and values"
    if getattr(config, "index_topk", None) or getattr(config, "index_head_dim", None):
        return "is sparse by itself"
    if getattr(config, "num_kv_shared_layers", 0):
        return "shares keys and values between layers"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"has layers of type {', '.join(sorted(kinds))}"
    return REFUSED.get(config.model_type)


def _refusal_of_modules(decoder: PreTrainedModel, family: str) -> str | None:
    modules = attention_modules(decoder)
    if not modules:
        return "has no attention layers with a cache"
    if family in ADAPTED:
        return None
    if not decoder._can_set_attn_implementation():
        return "does not let its attention function be chosen, and has no adapter here"
    if not all(getattr(module, "is_causal", False) for module in modules):
        return "has attention that is not causal"
    return None


def spans_all(config: Any, window: int) -> bool:
    """True for a sliding window at or above the model's positions (Phi-4: 262,144 of 131,072), which bounds no memory.

    Such a layer counts as full attention. A text longer than the window, which is beyond what the model was made for,
    then differs from the unpatched model: there the window would cut it.
    """
    positions = getattr(config, "max_position_embeddings", None)
    return positions is not None and window >= positions


def _windows(config: Any) -> list[int | None]:
    """The model's own sliding window per layer, None for full attention or a window that bounds nothing."""
    windows: list[int | None] = []
    for i, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicLayer:
            windows.append(None)
        elif isinstance(layer, DynamicSlidingWindowLayer):
            window = int(layer.sliding_window)
            windows.append(None if spans_all(config, window) else window)
        else:
            raise UnsupportedError(
                f"hf_longctx: expected full or sliding attention in layer {i} of '{config.model_type}'; got "
                f"{type(layer).__name__}. Use the model as it is."
            )
    return windows or [None] * int(config.num_hidden_layers)


def _layer(config: Any, module: Any, window: int | None) -> LayerFacts:
    """What a module says of itself, for layers may differ; else what the configuration says."""
    q_heads, own = int(config.num_attention_heads), vars(module)
    if isinstance(own.get("num_key_value_groups"), int):
        kv_heads = q_heads // own["num_key_value_groups"]
    elif config.model_type == "falcon":
        kv_heads = config.num_kv_heads if config.new_decoder_architecture or not config.multi_query else 1
    else:
        kv_heads = getattr(config, "num_key_value_heads", None) or q_heads
    head_dim = own.get("head_dim") or getattr(config, "head_dim", None) or config.hidden_size // q_heads
    return LayerFacts(q_heads, int(kv_heads), int(head_dim), window)


def _in_cache_limits(config: Any, family: str) -> tuple[int | None, str | None]:
    """The longest cache with constant rotary frequencies (None: any), and why in-cache positions are not possible."""
    if family in ALIBI and (family != "falcon" or config.alibi):
        return None, None
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        return None, "its positions are learned or absent, not rotary"
    kinds = rope.values() if all(isinstance(v, dict) for v in rope.values()) else [rope]
    limits = []
    for kind in kinds:
        if kind.get("rope_type") in ("dynamic", "longrope"):
            trained = kind.get("original_max_position_embeddings") if kind["rope_type"] == "longrope" else None
            limits.append(int(trained or config.max_position_embeddings))
    return min(limits, default=None), None


VISION = {
    facts.family: facts
    for facts in (
        VisionFacts("qwen2_vl", "video", 3),
        VisionFacts("qwen2_5_vl", "video", 3),
        VisionFacts("qwen3_vl", "video", 3),
        VisionFacts("llava_onevision", "video", 1),
        VisionFacts("smolvlm", "video", 1),
        VisionFacts("internvl", "video", 1),
        VisionFacts("idefics3", "image", 1),
    )
}
"""Vision-language models that stream, by family."""

REFUSED = {"diffllama": "attends twice in each layer, to two halves of its values"}
"""Families that their configuration does not tell from others, and why not, as the end of a sentence."""

ADAPTED = ("falcon", "mpt")
"""Families whose attention does not go through transformers' attention interface (`adapters.py`)."""

ALIBI = ("falcon", "mpt")
"""Families whose positions are linear biases, Falcon only where its configuration says so."""

WANTS_MASK = ("mpt",)
"""Families that use the mask as a tensor even where nothing is masked."""

NO_CACHE_BY_DEFAULT = ("mpt",)
"""Families whose configuration class says `use_cache=False`, though the model has a cache."""


def takes_positions(decoder: nn.Module) -> bool:
    """True if the decoder's forward has a `position_ids` argument."""
    kind: Any = type(decoder)
    return _takes_positions(kind)


@cache
def _takes_positions(kind: Any) -> bool:
    return "position_ids" in inspect.signature(kind.forward).parameters
