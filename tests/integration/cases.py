"""One tiny random model per family and rotary type, for every test that runs real transformers models.

All are fp32 on the CPU, small enough for a forward pass of milliseconds, and sensitive: weights are drawn so wide that
attention is far from uniform and a wrong position, mask or scale changes the greedy tokens. Sliding windows have 16
tokens and scaled rotary types an original length of 32, so that 60 tokens cross both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import transformers as hf

from .tiny import VOCABULARY, Case

WINDOW = 16  # of every sliding layer, in tokens
ORIGINAL = 32  # positions before scaling, of every scaled rotary type
_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_EAGER = {"attn_implementation": "eager"}  # transformers 5.17 defaults to sdpa for Gemma 2, which drops its softcap
_NO_GROUPS = ("num_key_value_heads",)
_MOE: Mapping[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _model(cls: str, config: str, /, *, drop: Sequence[str] = (), **facts: Any) -> Callable[[], hf.PreTrainedModel]:
    """Return a builder; `drop` names sizes that the family does not know, which its configuration would just keep."""
    sizes = {key: value for key, value in _SIZES.items() if key not in drop}
    return lambda: getattr(hf, cls)(getattr(hf, config)(**{**sizes, **facts}))


def _llama(**facts: Any) -> Callable[[], hf.PreTrainedModel]:
    return _model("LlamaForCausalLM", "LlamaConfig", **facts)


def _rope(kind: str, **facts: Any) -> dict[str, Any]:
    """Return the keyword of a rotary type; a small base, so that far positions differ clearly."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1000.0, **facts}}


def _falcon(**facts: Any) -> Callable[[], hf.PreTrainedModel]:
    drop = ("intermediate_size", *_NO_GROUPS)
    return _model("FalconForCausalLM", "FalconConfig", drop=drop, ffn_hidden_size=96, **facts)


def _vision_language(name: str, vision: dict[str, Any], **text: Any) -> Callable[[], hf.PreTrainedModel]:
    def build() -> hf.PreTrainedModel:
        rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}
        config = getattr(hf, f"{name}Config")(
            text_config={**_SIZES, "rope_parameters": rope, **text},
            vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, **vision},
            image_token_id=4,
            video_token_id=5,
            vision_start_token_id=6,
            vision_end_token_id=7,
            tie_word_embeddings=False,
        )
        model: hf.PreTrainedModel = getattr(hf, f"{name}ForConditionalGeneration")(config)
        return model

    return build


def _mpt(use_cache: bool = True) -> hf.PreTrainedModel:
    config = hf.MptConfig(d_model=64, n_heads=4, n_layers=2, max_seq_len=256, vocab_size=VOCABULARY, expansion_ratio=2)
    config.update({"use_cache": use_cache, "tie_word_embeddings": False, "bos_token_id": 1, "pad_token_id": 0})
    return hf.MptForCausalLM(config)


def _bloom() -> hf.PreTrainedModel:
    config = hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4, eos_token_id=None)
    return hf.BloomForCausalLM(config)


_OTHER: Mapping[str, Any] = {"kv_heads": 4, "groups": 1, "positions": "none", "rope": None, "rotary": 0.0}
_ALIBI: Mapping[str, Any] = {**_OTHER, "positions": "alibi"}
_LEARNED: Mapping[str, Any] = {**_OTHER, "positions": "learned"}
_ALTERNATING = ["sliding_attention", "full_attention"]
_GEMMA3_LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
}
_LONG = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.5 * i for i in range(8)]}
_SCALED = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
_QWEN2 = ("Qwen2ForCausalLM", "Qwen2Config")
_MISTRAL = ("MistralForCausalLM", "MistralConfig")
_PHI3 = ("Phi3ForCausalLM", "Phi3Config")

FAMILIES: tuple[Case, ...] = (
    Case("llama", _llama()),
    Case("llama_multi_head", _llama(num_key_value_heads=4), kv_heads=4, groups=1),
    Case("llama_multi_query", _llama(num_key_value_heads=1, num_hidden_layers=3), layers=3, kv_heads=1, groups=4),
    Case("llama_wide_heads", _llama(head_dim=32, attention_bias=True)),
    Case("mistral", _model(*_MISTRAL, sliding_window=None)),
    Case("mistral_sliding", _model(*_MISTRAL, sliding_window=WINDOW), sliding=(0, 1)),
    Case("qwen2", _model(*_QWEN2)),
    Case(
        "qwen2_sliding",
        _model(*_QWEN2, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        sliding=(1,),
    ),
    Case("qwen3", _model("Qwen3ForCausalLM", "Qwen3Config", head_dim=32)),
    Case("qwen3_moe", _model("Qwen3MoeForCausalLM", "Qwen3MoeConfig", head_dim=16, num_experts=4, **_MOE)),
    Case("phi3", _model(*_PHI3)),
    Case("phi3_wide_window", _model(*_PHI3, sliding_window=_SIZES["max_position_embeddings"])),
    Case("phi3_partial", _model(*_PHI3, **_rope("default", partial_rotary_factor=0.5)), rotary=0.5),
    Case(
        "gemma2",
        _model(
            "Gemma2ForCausalLM", "Gemma2Config", head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=24, **_EAGER
        ),
        sliding=(0,),
    ),
    Case(
        "gemma3",
        _model(
            "Gemma3ForCausalLM",
            "Gemma3TextConfig",
            head_dim=16,
            num_hidden_layers=4,
            sliding_window=WINDOW,
            layer_types=_GEMMA3_LAYERS,
            rope_parameters=_GEMMA3_ROPE,
            query_pre_attn_scalar=24,
        ),
        layers=4,
        sliding=(0, 1, 3),
    ),
    Case(
        "gpt_neox",
        _model("GPTNeoXForCausalLM", "GPTNeoXConfig", drop=_NO_GROUPS, **_rope("default", partial_rotary_factor=0.25)),
        kv_heads=4,
        groups=1,
        rotary=0.25,
    ),
    Case("falcon_new", _falcon(new_decoder_architecture=True, num_kv_heads=2), interface=False),
    Case("falcon_multi_query", _falcon(multi_query=True), kv_heads=1, groups=4, interface=False),
    Case("falcon_multi_head", _falcon(multi_query=False), kv_heads=4, groups=1, interface=False),
    Case(
        "falcon_alibi",
        _falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True),
        **_ALIBI,
        interface=False,
    ),
    Case("mpt", _mpt, interface=False, **_ALIBI),
    Case("mpt_default", lambda: _mpt(use_cache=False), interface=False, **_ALIBI),
    Case("olmo2", _model("Olmo2ForCausalLM", "Olmo2Config")),
    Case(
        "gpt_oss",
        _model(
            "GptOssForCausalLM",
            "GptOssConfig",
            head_dim=16,
            sliding_window=WINDOW,
            layer_types=_ALTERNATING,
            num_local_experts=4,
            num_experts_per_tok=2,
            **_rope("yarn", beta_fast=32.0, beta_slow=1.0, truncate=False, **_SCALED),
        ),
        sliding=(0,),
        rope="yarn",
    ),
    Case(
        "granite",
        _model(
            "GraniteForCausalLM",
            "GraniteConfig",
            attention_multiplier=0.4,
            embedding_multiplier=2.0,
            residual_multiplier=0.5,
            logits_scaling=2.0,
        ),
    ),
    Case("smollm3", _model("SmolLM3ForCausalLM", "SmolLM3Config", num_hidden_layers=4), layers=4, nope=(3,)),
    Case(
        "qwen2_5_vl",
        _vision_language("Qwen2_5_VL", {"intermediate_size": 32, "fullatt_block_indexes": [0]}),
        text_config=True,
    ),
    Case(
        "qwen3_vl",
        _vision_language("Qwen3VL", {"intermediate_size": 32, "deepstack_visual_indexes": [0]}, head_dim=16),
        text_config=True,
    ),
    Case("cohere", _model("CohereForCausalLM", "CohereConfig", logit_scale=1.0)),
    Case("stablelm", _model("StableLmForCausalLM", "StableLmConfig"), rotary=0.25),
    Case("glm", _model("GlmForCausalLM", "GlmConfig", head_dim=16), rotary=0.5),
)

ROPE_TYPES: tuple[Case, ...] = (
    Case("llama_linear", _llama(**_rope("linear", factor=4.0)), rope="linear"),
    Case(
        "llama_dynamic",
        _llama(max_position_embeddings=ORIGINAL, **_rope("dynamic", factor=4.0)),
        rope="dynamic",
        remembers=True,
    ),
    Case(
        "llama_llama3",
        _llama(**_rope("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **_SCALED)),
        rope="llama3",
    ),
    Case("llama_yarn", _llama(**_rope("yarn", **_SCALED)), rope="yarn"),
    Case("llama_longrope", _llama(**_rope("longrope", **_LONG, **_SCALED)), rope="longrope"),
    Case(
        "phi3_longrope",
        _model(*_PHI3, original_max_position_embeddings=ORIGINAL, **_rope("longrope", **_LONG, **_SCALED)),
        rope="longrope",
    ),
)

_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_T5 = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

LEARNED_POSITIONS: tuple[Case, ...] = (
    Case(
        "gpt2",
        _model("GPT2LMHeadModel", "GPT2Config", drop=_NO_GROUPS, n_embd=64, n_layer=2, n_head=4, n_positions=256),
        **_LEARNED,
    ),
    Case(
        "opt",
        _model("OPTForCausalLM", "OPTConfig", drop=_NO_GROUPS, ffn_dim=96, word_embed_proj_dim=64),
        **_LEARNED,
    ),
)

REFUSED: tuple[Case, ...] = (
    Case("bert", _model("BertForMaskedLM", "BertConfig"), generates=False, refused="encoder", **_LEARNED),
    Case("t5", _model("T5ForConditionalGeneration", "T5Config", **_T5), refused="encoder-decoder", **_OTHER),
    Case(
        "deepseek_v3",
        _model(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            num_key_value_heads=4,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            **_MOE,
            **_MLA,
        ),
        kv_heads=4,
        groups=1,
        refused="latent attention",
    ),
    Case(
        "diffllama",
        _model("DiffLlamaForCausalLM", "DiffLlamaConfig"),
        refused="attends twice in each layer",
    ),
    Case("mamba", _model("MambaForCausalLM", "MambaConfig"), refused="no attention", **_OTHER),
    Case(
        "llama4",
        _model(
            "Llama4ForCausalLM",
            "Llama4TextConfig",
            head_dim=16,
            num_hidden_layers=4,
            attention_chunk_size=WINDOW,
            num_local_experts=2,
            num_experts_per_tok=1,
            intermediate_size_mlp=96,
        ),
        layers=4,
        nope=(3,),
        refused="chunked attention",
    ),
    Case(
        "bloom",
        _bloom,
        **_ALIBI,
        interface=False,
        refused="alibi built from the mask",
    ),
)

CASES: tuple[Case, ...] = (*FAMILIES, *ROPE_TYPES, *LEARNED_POSITIONS, *REFUSED)
BY_NAME: Mapping[str, Case] = {case.name: case for case in CASES}
