"""Every mode of `generate()` on windows that really drop tokens, against the same model without a cache.

Without a cache a patched model encodes the whole text at every step, under the same visibility: slow, and free of every
fault that storing, evicting, reordering or cropping could have.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import hf_longctx as lc
from hf_longctx.models import CACHE

from ..methods.cases import LIMITS, LOSSY, Row, changes_with_length, gates, named, pairs
from ..methods.test_limits import TOLERANCE, error
from .cases import BY_NAME, ORIGINAL
from .tiny import Case

PROMPT, NEW = 40, 12
AT_FLOOR = hf.__version__.startswith("5.17.")  # unpatched models fail in three places that later releases mended
REAL_TOKENS = {"suppress_tokens": list(range(8))}  # generated padding would be taken for padding of the prompt

EXACT = [(row, case) for row, case in pairs(LOSSY) if row.in_cache or not changes_with_length(case)]
"""Where frequencies change with the length, stored keys and keys encoded again differ in the unpatched model too."""

SOME = [
    (row, BY_NAME[name])
    for row in LOSSY
    for name in ("llama", "gemma3", "gpt_oss", "gpt_neox", "falcon_new", "mpt", "smollm3", "qwen3_vl")
]

every = pytest.mark.parametrize(("row", "case"), EXACT, ids=named)
some = pytest.mark.parametrize(("row", "case"), SOME, ids=named)


def batch(case: Case) -> dict[str, Tensor]:
    """Two rows, one of them padded on the left by more than a window."""
    mask = (torch.arange(PROMPT) >= torch.tensor([14, 0])[:, None]).long()
    return {"input_ids": case.prompt(PROMPT, rows=2) * mask, "attention_mask": mask}


def single(case: Case, repeats: int = 1) -> dict[str, Tensor]:
    """One row; with repeats, a text that a lookup can guess from."""
    ids = case.prompt(PROMPT // repeats).repeat(1, repeats)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Greedy unless told otherwise; seeded."""
    torch.manual_seed(0)
    options = {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, **options)


@every
def test_greedy_equals_encoding_the_whole_text_at_every_step(row: Row, case: Case) -> None:
    model = lc.patch(case.make(), row.method(case))
    got = generate(model, batch(case), output_logits=True)
    seen, stored = lc.report(model).tokens_seen, lc.report(model).tokens_stored
    assert seen == PROMPT + NEW - 1
    assert stored < seen or row.name == "duo_attention"
    expected = generate(model, batch(case), output_logits=True, use_cache=False)
    assert torch.equal(got.sequences, expected.sequences)
    assert error(torch.stack(got.logits), torch.stack(expected.logits)) < TOLERANCE


MODES: dict[str, dict[str, Any]] = {
    "sample": {"do_sample": True, "temperature": 1.3, "num_return_sequences": 3},
    "top_k_top_p": {"do_sample": True, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2},
    "beams": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "beams_sampled": {"num_beams": 3, "do_sample": True},
}


@pytest.mark.parametrize("mode", MODES)
@some
def test_modes_equal_encoding_the_whole_text_at_every_step(row: Row, case: Case, mode: str) -> None:
    model = lc.patch(case.make(), row.method(case))
    got = generate(model, batch(case), **MODES[mode])
    expected = generate(model, batch(case), use_cache=False, **MODES[mode])
    assert torch.equal(got.sequences, expected.sequences)


@pytest.mark.parametrize("size", [1, 5, 16])
@some
def test_prefill_in_chunks_equals_prefill_at_once(row: Row, case: Case, size: int) -> None:
    if AT_FLOOR and case.text_config:
        with pytest.raises(RuntimeError, match="must match the size of tensor"):
            generate(case.make(), batch(case), prefill_chunk_size=size)
        return
    model = lc.patch(case.make(), row.method(case))
    got = generate(model, batch(case), prefill_chunk_size=size, output_logits=True)
    expected = generate(model, batch(case), output_logits=True)
    assert torch.equal(got.sequences, expected.sequences)
    assert error(torch.stack(got.logits), torch.stack(expected.logits)) < TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("row", LIMITS, ids=named)
def test_modes_at_the_limit_equal_the_unpatched_model(row: Row, mode: str) -> None:
    case = BY_NAME["llama"]
    expected = generate(case.make(), batch(case), **MODES[mode])
    got = generate(lc.patch(case.make(), row.method(case)), batch(case), **MODES[mode])
    assert torch.equal(got.sequences, expected.sequences)


# speculation --------------------------------------------------------------------------------------------------------


def greedy(model: Any, case: Case, repeats: int = 1) -> Tensor:
    tokens: Tensor = generate(model, single(case, repeats), **REAL_TOKENS).sequences
    return tokens


def eager(assistant: Any, guesses: int) -> Any:
    """The assistant, guessing so many tokens each time however unsure it is."""
    config = assistant.generation_config
    config.num_assistant_tokens, config.assistant_confidence_threshold = guesses, 0.0
    config.num_assistant_tokens_schedule = "constant"
    return assistant


@pytest.mark.parametrize("guesses", [1, 5, 20])
@some
def test_assisted_decoding_changes_nothing(row: Row, case: Case, guesses: int) -> None:
    if AT_FLOOR and case.sliding and guesses > 1:
        with pytest.raises(RuntimeError, match="must match the size of tensor"):
            generate(case.make(), single(case), assistant_model=eager(case.make(seed=1), guesses), **REAL_TOKENS)
        return
    model = lc.patch(case.make(), row.method(case))
    got = generate(model, single(case), assistant_model=eager(case.make(), guesses), **REAL_TOKENS).sequences
    assert torch.equal(got, greedy(model, case))


@pytest.mark.parametrize("seed", [0, 1], ids=["right", "wrong"])
@some
def test_a_patched_assistant_changes_nothing(row: Row, case: Case, seed: int) -> None:
    model = lc.patch(case.make(), row.method(case))
    assistant = eager(lc.patch(case.make(seed), row.method(case)), 5)
    got = generate(model, single(case), assistant_model=assistant, **REAL_TOKENS).sequences
    assert torch.equal(got, greedy(model, case))


@some
def test_a_patched_assistant_helps_an_unpatched_model(row: Row, case: Case) -> None:
    model, assistant = case.make(), eager(lc.patch(case.make(), row.method(case)), 5)
    expected = greedy(model, case)
    got = generate(model, single(case), assistant_model=assistant, **REAL_TOKENS).sequences
    assert torch.equal(got, expected)


@some
def test_prompt_lookup_changes_nothing(row: Row, case: Case) -> None:
    model = lc.patch(case.make(), row.method(case))
    got = generate(model, single(case, repeats=4), prompt_lookup_num_tokens=6, **REAL_TOKENS).sequences
    assert torch.equal(got, greedy(model, case, repeats=4))


@pytest.mark.parametrize("prompt", [16, 40], ids=["crosses", "starts_beyond"])
def test_speculation_where_the_model_drops_its_cache(prompt: int) -> None:
    """Phi-3 does so at its original length, where frequencies change, and encodes the text again."""
    case = BY_NAME["phi3_longrope"]
    model = lc.patch(case.make(), LOSSY[0].method(case))
    inputs = {"input_ids": case.prompt(8).repeat(1, prompt // 8)}
    options = {"max_new_tokens": 24, **REAL_TOKENS}
    if AT_FLOOR and prompt < ORIGINAL:  # drops the cache, and yet passes the last token alone
        with pytest.raises(ValueError, match="Pass the mask of the whole text so far"):
            generate(model, inputs, **options)
        return
    expected = generate(model, inputs, **options).sequences
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=6, **options).sequences, expected)
    assert torch.equal(generate(model, inputs, assistant_model=eager(case.make(), 5), **options).sequences, expected)


def test_speculation_really_takes_tokens_back(monkeypatch: pytest.MonkeyPatch) -> None:
    removed: list[int] = []
    stock = lc.LongContextCache.crop
    monkeypatch.setattr(lc.LongContextCache, "crop", lambda cache, n: removed.append(-n) or stock(cache, n))
    case = BY_NAME["llama"]
    model = lc.patch(case.make(), LOSSY[0].method(case))
    generate(model, single(case), assistant_model=eager(case.make(), 20), **REAL_TOKENS)
    assert max(removed) > 8  # of a window of 9


# caches that are not ours ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("implementation", "name"), [("static", "StaticCache"), ("offloaded", "DynamicCache")])
def test_other_caches_are_refused_by_name(implementation: str, name: str) -> None:
    case = BY_NAME["llama"]
    model = lc.patch(case.make(), "dense")
    with pytest.raises(TypeError, match=f"got a {name}.*Leave out past_key_values and cache_implementation"):
        generate(model, single(case), cache_implementation=implementation)
    assert torch.equal(greedy(model, case), greedy(lc.unpatch(model), case))


def test_a_quantized_cache_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stock quantized caches need packages of their own; a stand-in of that name needs none."""
    from transformers.generation import utils

    class QuantizedCache(utils.DynamicCache):
        def __init__(self, backend: str, **config: Any) -> None:
            super().__init__()

    monkeypatch.setattr(utils, "QuantizedCache", QuantizedCache)
    case = BY_NAME["llama"]
    with pytest.raises(TypeError, match="got a QuantizedCache"):
        generate(lc.patch(case.make(), "dense"), single(case), cache_implementation="quantized")


def test_continuous_batching_is_refused_by_name() -> None:
    """Inside it, what our hooks refuse would be a line in a log and an empty answer."""
    case = BY_NAME["llama"]
    model = lc.patch(case.make(), "dense")
    with pytest.raises(lc.UnsupportedError, match="got continuous batching"):
        model.generate_batch(case.prompt(10).tolist(), generation_config=hf.GenerationConfig(max_new_tokens=2))
    assert "init_continuous_batching" not in vars(lc.unpatch(model))


def test_a_dynamic_cache_is_taken_for_the_default() -> None:
    case = BY_NAME["llama"]
    model = lc.patch(case.make(), LOSSY[0].method(case))
    out = generate(model, single(case), cache_implementation="dynamic")
    assert isinstance(out.past_key_values, lc.LongContextCache)
    assert torch.equal(out.sequences, generate(model, single(case)).sequences)


GIVEN: dict[str, tuple[Callable[[Any], dict[str, Any]], bool]] = {
    "nothing": (lambda model: {}, True),
    "yes": (lambda model: {"use_cache": True}, True),
    "no": (lambda model: {"use_cache": False}, False),
    "settings": (lambda model: {"generation_config": hf.GenerationConfig(do_sample=False)}, True),
    "the model's settings": (lambda model: {"generation_config": copy.deepcopy(model.generation_config)}, True),
    "settings that say no": (lambda model: {"generation_config": hf.GenerationConfig(use_cache=False)}, False),
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_family_without_a_cache_by_default_gets_one_unless_the_call_says_no(given: str) -> None:
    case = BY_NAME["mpt_default"]
    model = lc.patch(case.make(), "dense")
    options, cached = GIVEN[given]
    got = model.generate(**single(case), max_new_tokens=NEW, **options(model))
    assert lc.report(model).tokens_seen == (PROMPT + NEW - 1 if cached else 0)
    assert model.generation_config.use_cache is False
    assert torch.equal(got, case.make().generate(**single(case), max_new_tokens=NEW, do_sample=False))


def test_a_family_with_a_cache_by_default_does_without_where_its_settings_say_so() -> None:
    case = BY_NAME["llama"]
    model = lc.patch(case.make(), "dense")
    model.generation_config.use_cache = False
    generate(model, single(case))
    assert lc.report(model).tokens_seen == 0


def test_embeddings_as_prompt() -> None:
    for row in LOSSY:
        case = BY_NAME["qwen3"]
        model = lc.patch(case.make(), row.method(case))
        inputs = batch(case)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        got = generate(model, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}).sequences
        assert torch.equal(got, generate(model, inputs).sequences[:, PROMPT:])


def test_duo_attention_generates_with_gates_from_a_folder(tmp_path: Any) -> None:
    case = BY_NAME["llama"]
    lines = ["\t".join(map(str, line)) for line in gates(case)]
    (tmp_path / "full_attention_heads.tsv").write_text("\n".join(lines) + "\n")
    (tmp_path / "config.json").write_text('{"sink_size": 2, "recent_size": 5}')
    model = lc.patch(case.make(), "duo_attention", pattern=tmp_path, sparsity=0.5)
    expected = generate(lc.patch(case.make(), LOSSY[1].method(case)), batch(case)).sequences
    assert torch.equal(generate(model, batch(case)).sequences, expected)


def test_a_token_taken_back_is_not_seen_through_a_wider_window() -> None:
    """It lies where an older one was, which a prompt would see again."""
    case, seen = BY_NAME["llama"], []
    knobs = {"token_budget": 24, "refresh_every": 1, "kv": "native", "sinks": 2, "window": 5, "prefill_window": 9}
    model = lc.patch(case.make(), lc.LServe(pattern=gates(case), sparsity=0.5, page=8, logical=4, **knobs))
    ids = case.prompt(80)
    for extra in (1, 2):
        with torch.no_grad():
            cache = model(ids[:, :40])[CACHE]
            for token in (*ids[0, 40:50], torch.tensor(extra)):
                model(token.view(1, 1), **{CACHE: cache})
            cache.crop(-1)
            seen.append(model(ids[:, 50:70], **{CACHE: cache}).logits)
    assert torch.equal(*seen)
