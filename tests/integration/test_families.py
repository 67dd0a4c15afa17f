"""Families whose layers differ from each other, or which count positions otherwise; as far as transformers has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers as hf

import hf_longctx as lc
from hf_longctx.models import CACHE, inspect_model

from ..methods.test_limits import TOLERANCE, error
from .cases import _MOE, _NO_GROUPS, _SIZES, BY_NAME, ORIGINAL, WINDOW, _model, _rope
from .test_generate import NEW, PROMPT, batch, generate, single
from .tiny import Case

_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_MIXED: Mapping[str, Any] = {"num_hidden_layers": 4, "sliding_window": WINDOW, "layer_types": _LAYERS, "head_dim": 16}
_GEMMA4 = {"global_head_dim": 32, "num_global_key_value_heads": 1, "vocab_size_per_layer_input": _SIZES["vocab_size"]}
_YARN = {"factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}


def _gemma4(**facts: Any) -> Callable[[], hf.PreTrainedModel]:
    return _model("Gemma4ForCausalLM", "Gemma4TextConfig", **_MIXED, **_GEMMA4, hidden_size_per_layer_input=8, **facts)


def _jetmoe() -> hf.PreTrainedModel:
    sizes = {name: size for name, size in _SIZES.items() if name not in ("num_attention_heads", "head_dim")}
    return hf.JetMoeForCausalLM(hf.JetMoeConfig(**sizes, kv_channels=16, num_local_experts=4, num_experts_per_tok=2))


ALL: tuple[tuple[Case, str, list[tuple[int, int]]], ...] = (
    (Case("gemma4", _gemma4(), layers=4), "Gemma4ForCausalLM", [(2, 16), (2, 32)] * 2),
    (
        Case("gemma4_k_is_v", _gemma4(attention_k_eq_v=True), layers=4),
        "Gemma4ForCausalLM",
        [(2, 16), (1, 32)] * 2,
    ),
    (
        Case(
            "mimo_v2_flash",
            _model("MiMoV2FlashForCausalLM", "MiMoV2FlashConfig", **_MIXED, v_head_dim=8, n_routed_experts=4, **_MOE),
            layers=4,
        ),
        "MiMoV2FlashForCausalLM",
        [(4, 16), (2, 16)] * 2,
    ),
    (Case("jetmoe", _jetmoe), "JetMoeForCausalLM", [(4, 16)] * 2),
)
"""A model, its class, and of each layer KV heads and their channels."""

FAMILIES = [each for each in ALL if hasattr(hf, each[1])]

METHODS: Mapping[str, Any] = {
    "dense": lc.Dense(),
    "streaming_llm": lc.StreamingLLM(sinks=4, window=60),
    "quest": lc.Quest(64, page=4, dense_layers=0),
    "xattention": lc.XAttention(stride=4, tau=1.0, block=8, dense_below=0),
    "inf_llm": lc.InfLLM(init=8, local=64, block=8, topk=1, representatives=2, q_block=16, resident_blocks=2),
}
"""Where each is dense attention."""

each = pytest.mark.parametrize(("case", "cls", "heads"), FAMILIES, ids=[x[0].name for x in FAMILIES])


@each
def test_heads_of_each_layer(case: Case, cls: str, heads: list[tuple[int, int]]) -> None:
    assert [(layer.kv_heads, layer.head_dim) for layer in inspect_model(case.make()).layers] == heads


@each
def test_what_is_planned_for_layers_that_differ(case: Case, cls: str, heads: list[tuple[int, int]]) -> None:
    """For all methods but those that need a pattern of heads, of which none fits."""
    look = lc.plan(case.make(), 1024, memory="1GiB")
    assert set(look.refused) == {"duo_attention", "lserve"}
    assert "expected a published head pattern" in look.refused["duo_attention"]


@pytest.mark.parametrize("method", METHODS)
@each
@torch.no_grad()
def test_layers_that_differ_equal_the_unpatched_model(case: Case, cls: str, heads: Any, method: str) -> None:
    stock, model = case.make(), lc.patch(case.make(), METHODS[method])
    expected, got = (generate(x, batch(case), output_logits=True) for x in (stock, model))
    assert torch.equal(got.sequences, expected.sequences)
    assert error(torch.stack(got.logits), torch.stack(expected.logits)) < TOLERANCE
    ids, cache, parts = case.prompt(PROMPT), None, []
    for chunk in ids.split(7, 1):
        out = model(chunk, use_cache=True, **({} if cache is None else {CACHE: cache}))
        cache, parts = out[CACHE], [*parts, out.logits]
    assert error(torch.cat(parts, 1), stock(ids).logits) < TOLERANCE


@each
def test_layers_that_differ_where_most_is_dropped(case: Case, cls: str, heads: Any) -> None:
    model = lc.patch(case.make(), lc.StreamingLLM(sinks=2, window=9))
    got = generate(model, batch(case), output_logits=True)
    expected = generate(model, batch(case), output_logits=True, use_cache=False)
    assert torch.equal(got.sequences, expected.sequences)
    assert error(torch.stack(got.logits), torch.stack(expected.logits)) < TOLERANCE


# positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [lc.Dense(), METHODS["quest"]], ids=["dense", "quest"])
@torch.no_grad()
def test_learned_positions_are_the_models_own(method: Any) -> None:
    """RoBERTa counts them from the number after its padding's, where nobody gives them."""
    build = _model("RobertaForCausalLM", "RobertaConfig", drop=_NO_GROUPS, is_decoder=True)
    case = Case("roberta", build, positions="learned")
    stock, model, real = case.make(), lc.patch(case.make(), method), batch(case)["attention_mask"].bool()
    expected, got = (x(**batch(case)).logits for x in (stock, model))
    assert error(got[real], expected[real]) < TOLERANCE


@pytest.mark.skipif(not hasattr(hf, "Ministral3ForCausalLM"), reason="this transformers has no Ministral 3")
def test_windows_where_queries_are_scaled_by_their_position() -> None:
    """Positions that begin again with each lap would scale them up and down."""
    rope = _rope("yarn", original_max_position_embeddings=ORIGINAL, llama_4_scaling_beta=0.5, **_YARN)
    case = Case("ministral3", _model("Ministral3ForCausalLM", "Ministral3Config", head_dim=16, **rope))
    model = case.make()
    with pytest.raises(lc.UnsupportedError, match=f"its queries are scaled .* Use window={ORIGINAL - 4} "):
        lc.patch(model, "streaming_llm", sinks=4, window=ORIGINAL)
    expected = generate(case.make(), batch(case)).sequences
    assert torch.equal(generate(model, batch(case)).sequences, expected)
    assert torch.equal(generate(lc.patch(model, "dense"), batch(case)).sequences, expected)
    lc.patch(model, "streaming_llm", sinks=4, window=ORIGINAL - 4)


# what only a call shows -------------------------------------------------------------------------------------------


def test_a_layer_that_attends_twice_is_refused() -> None:
    """The second time it would find, and store again, the tokens of the first."""
    case = BY_NAME["llama"]
    model = lc.patch(case.make(), "dense")
    module = model.model.layers[1].self_attn
    stock = module.forward
    module.forward = lambda *args, **kwargs: [stock(*args, **kwargs) for _ in range(2)][1]
    with pytest.raises(lc.UnsupportedError, match=r"got another call in layer 1 \(LlamaAttention\)"):
        generate(model, single(case))
    del module.forward
    assert torch.equal(generate(model, single(case)).sequences, generate(case.make(), single(case)).sequences)


def test_a_window_of_the_cache_alone_is_refused() -> None:
    """Such a model reads all of a prompt, and in steps no more than the window."""
    case = BY_NAME["gemma3"]
    model = lc.patch(case.make(), "dense")
    model.model.layers[1].self_attn.sliding_window = None
    with pytest.raises(lc.UnsupportedError, match=f"in layer 1 .*got sliding_window=None.*window of {WINDOW} tokens"):
        model.generate(**single(case), max_new_tokens=NEW)


# masks that a model around the decoder has made ----------------------------------------------------------------------


def _gemma3_with_pictures(implementation: str) -> hf.PreTrainedModel:
    text = {**_SIZES, **_MIXED, "query_pre_attn_scalar": 24}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.Gemma3Config(
        text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, mm_tokens_per_image=4,
        boi_token_index=6, eoi_token_index=7, image_token_index=4, tie_word_embeddings=False,
    )  # fmt: skip
    return hf.Gemma3ForConditionalGeneration._from_config(config, attn_implementation=implementation)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_text_for_a_model_that_makes_its_masks_around_the_decoder(method: str, implementation: str) -> None:
    case = Case("gemma3_pictures", lambda: _gemma3_with_pictures(implementation), layers=4, text_config=True)
    stock, model = case.make(), lc.patch(case.make(), METHODS[method])
    for inputs in (batch(case), single(case)):
        expected, got = (generate(x, inputs, output_logits=True) for x in (stock, model))
        assert torch.equal(got.sequences, expected.sequences)
        assert error(torch.stack(got.logits), torch.stack(expected.logits)) < TOLERANCE


def test_such_masks_where_most_is_dropped() -> None:
    case = Case("gemma3_pictures", lambda: _gemma3_with_pictures("sdpa"), layers=4, text_config=True)
    model = lc.patch(case.make(), lc.StreamingLLM(sinks=2, window=9))
    got, expected = (generate(model, batch(case), use_cache=cached).sequences for cached in (True, False))
    assert torch.equal(got, expected)
    in_turns = generate(model, batch(case), prefill_chunk_size=7).sequences
    assert torch.equal(in_turns, expected)


@torch.no_grad()
def test_pictures_that_are_read_in_both_directions_are_refused() -> None:
    case = Case("gemma3_pictures", lambda: _gemma3_with_pictures("sdpa"), layers=4, text_config=True)
    model, ids = lc.patch(case.make(), "dense"), case.prompt(20)
    ids[0, 5:9] = 4
    kinds = (ids == 4).long()
    pictures = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with pytest.raises(lc.UnsupportedError, match="got one with more to it"):
        model(ids, pixel_values=pictures, token_type_ids=kinds)
    text = case.prompt(20)
    expected = case.make()(text).logits
    assert error(model(text, token_type_ids=torch.zeros_like(text)).logits, expected) < TOLERANCE
