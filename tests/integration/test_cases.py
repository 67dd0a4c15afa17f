"""The tiny models are what their descriptions say, before anything of ours touches them."""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, WINDOW
from .tiny import Case

DECODERS = [case for case in CASES if case.refused is None]
CACHED = [
    case for case in DECODERS if not case.name.startswith("falcon")
]  # Falcon repeats KV heads before it stores them


def _named(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


@_named([case for case in CASES if case.generates and case.name != "t5"])
def test_stock_generate_runs_across_window_and_original_length(case: Case) -> None:
    prompt = case.prompt(60)
    output = case.make().generate(prompt, max_new_tokens=4, do_sample=False)
    assert torch.equal(output[:, :60], prompt)
    assert output.shape == (1, 64)


@_named(CACHED)
@torch.no_grad()
def test_layers_heads_and_windows(case: Case) -> None:
    model = case.make()
    cache = model(case.prompt(WINDOW + 4), use_cache=True).past_key_values
    assert len(cache.layers) == case.layers
    assert {layer.keys.shape[1] for layer in cache.layers} == {case.kv_heads}
    assert (
        tuple(i for i, layer in enumerate(cache.layers) if getattr(layer, "sliding_window", 0) == WINDOW)
        == case.sliding
    )
    text = model.config.get_text_config(decoder=True)
    assert text.num_attention_heads == case.kv_heads * case.groups


@_named([case for case in DECODERS if case.rope is not None])
@torch.no_grad()
def test_rotary_type_and_share(case: Case) -> None:
    rotary = case.make().get_decoder().rotary_emb
    names = rotary.rope_type.values() if isinstance(rotary.rope_type, dict) else [rotary.rope_type]
    assert case.rope in names
    frequencies = next(buffer for name, buffer in rotary.named_buffers() if name.endswith("inv_freq"))
    text = rotary.config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    assert 2 * len(frequencies) == case.rotary * head


@_named([case for case in DECODERS if not case.sliding or len(case.sliding) < case.layers])
@torch.no_grad()
def test_far_and_near_tokens_matter(case: Case) -> None:
    prompt = case.prompt(60)
    logits = case.make()(prompt).logits[0, -1]
    for changed in (0, 55):
        other = prompt.clone()
        other[0, changed] = 8 + (prompt[0, changed] - 7) % 120
        assert (case.make()(other).logits[0, -1] - logits).abs().max() > 1e-2


def test_the_same_seed_gives_the_same_model() -> None:
    first, second, other = CASES[0].make(), CASES[0].make(), CASES[0].make(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)
