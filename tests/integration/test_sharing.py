"""Several models in one process: a configuration in common, copies, pickles; none may notice another."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_longctx as lc

from ..methods.cases import LOSSY, Row, named
from .cases import BY_NAME
from .snapshot import differences, snapshot
from .test_generate import REAL_TOKENS, batch, generate
from .test_patch import logits, work
from .tiny import Case

SOME = [
    BY_NAME[name] for name in ("llama", "gemma3", "gpt_oss", "falcon_new", "falcon_alibi", "mpt", "opt", "qwen3_vl")
]
some = pytest.mark.parametrize("case", SOME, ids=named)
rows = pytest.mark.parametrize("row", LOSSY, ids=named)
FIRST, SECOND = (row.method for row in LOSSY)


def twins(case: Case, implementation: str = "sdpa") -> tuple[Any, Any]:
    """Two models of different weights that were built from one configuration object."""
    first = case.make()
    if implementation == "eager" or first._supports_sdpa:
        first.set_attn_implementation(implementation)
    second = type(first)(first.config).eval()
    second.load_state_dict(case.make(seed=1).state_dict())
    second.generation_config = first.generation_config
    assert first.get_decoder().config is second.get_decoder().config
    return first, second


def method(case: Case) -> Any:
    """One that drops tokens, and that the model takes."""
    return LOSSY[0].method(case) if LOSSY[0].takes(case) else LOSSY[1].method(case)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@some
def test_an_unpatched_model_with_the_same_configuration_notices_nothing(case: Case, implementation: str) -> None:
    first, second = twins(case, implementation)
    implementation = first.get_decoder().config._attn_implementation  # some families have but one
    expected, text = logits(second, case), generate(second, batch(case)).sequences
    lc.patch(first, method(case))
    assert torch.equal(logits(second, case), expected)
    assert torch.equal(generate(second, batch(case)).sequences, text)
    logits(first, case)
    assert torch.equal(logits(second, case), expected)
    lc.unpatch(first)
    assert torch.equal(logits(second, case), expected)
    assert first.get_decoder().config._attn_implementation == implementation


@some
def test_both_patched_one_after_the_other(case: Case) -> None:
    first, second = twins(case)
    alone = [lc.patch(case.make(seed), method(case)) for seed in (0, 1)]
    stock = [logits(model, case) for model in (first, second)]
    expected = [logits(model, case) for model in alone]
    lc.patch(first, method(case))
    lc.patch(second, method(case))
    assert torch.equal(logits(first, case), expected[0])
    assert torch.equal(logits(second, case), expected[1])
    lc.unpatch(first)
    assert torch.equal(logits(first, case), stock[0])
    assert torch.equal(logits(second, case), expected[1])
    lc.unpatch(second)
    assert torch.equal(logits(second, case), stock[1])
    assert first.get_decoder().config is second.get_decoder().config


def test_a_model_with_the_same_configuration_after_an_interrupt() -> None:
    """A call that is killed from the keyboard never reaches its end; nobody else may inherit its context."""
    case = BY_NAME["llama"]
    first, second = twins(case)
    expected = logits(second)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    lc.patch(first, method(case)).model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        logits(first)
    assert torch.equal(logits(second), expected)


def test_a_layer_called_by_itself_is_refused() -> None:
    model = lc.patch(BY_NAME["llama"].make(), "dense")
    x = torch.randn(1, 5, 64)
    places = model.model.rotary_emb(x, torch.arange(5)[None])
    with pytest.raises(RuntimeError, match="expected LlamaAttention to run inside a call of a patched model"):
        model.model.layers[0].self_attn(x, position_embeddings=places, attention_mask=None)


def test_our_name_on_a_model_that_is_not_patched() -> None:
    lc.unpatch(lc.patch(BY_NAME["llama"].make(), "dense"))  # the name is registered from the first patch on
    model = BY_NAME["llama"].make()
    model.set_attn_implementation("hf_longctx")
    with pytest.raises(RuntimeError, match="inside a call of a patched model; got attn_implementation='hf_longctx'"):
        logits(model)


def test_settings_made_while_patched_count_at_once_and_stay() -> None:
    case = BY_NAME["llama"]
    first, second = twins(case)
    ids = case.prompt(5)
    lc.patch(first, method(case))
    assert first(ids).past_key_values is not None
    first.config.use_cache = False
    assert first(ids).past_key_values is None
    second.config.output_hidden_states = True  # the same object
    assert first(ids).hidden_states is not None
    first.get_decoder().config.use_cache = True  # of the decoder alone
    first(ids)
    assert first.config.use_cache
    second.config.use_cache = False
    lc.unpatch(first)
    assert first.config is first.get_decoder().config is second.config
    assert not first.config.use_cache
    assert first.config.output_hidden_states
    assert first.config._attn_implementation == "sdpa"


# copies ----------------------------------------------------------------------------------------------------


@some
def test_a_copy_of_a_patched_model_lives_on_its_own(case: Case) -> None:
    model = lc.patch(case.make(), method(case))
    patched, stock = logits(model, case), logits(case.make(), case)
    twin = copy.deepcopy(model)
    before = snapshot(model)
    assert torch.equal(logits(twin, case), patched)
    assert torch.equal(work(twin, case), patched)
    lc.patch(twin, "dense")
    assert lc.report(twin).method == "dense"
    assert differences(before, snapshot(model)) == []
    assert torch.equal(logits(model, case), patched)
    lc.unpatch(twin)
    assert torch.equal(logits(twin, case), stock)
    assert torch.equal(logits(model, case), patched)
    assert not {"_hf_longctx", "_prepare_cache_for_generation"} & vars(twin).keys()
    other = copy.deepcopy(model)
    lc.unpatch(model)
    assert torch.equal(logits(model, case), stock)
    assert torch.equal(logits(other, case), patched)
    with torch.no_grad():
        other.get_input_embeddings().weight.add_(1)
    assert not torch.equal(logits(other, case), patched)
    assert torch.equal(logits(model, case), stock)


@some
def test_a_patched_model_survives_pickle(case: Case) -> None:
    model = lc.patch(case.make(), method(case))
    expected = work(model, case)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(work(twin, case), expected)
    assert lc.report(twin).plan == lc.report(model).plan
    assert torch.equal(logits(lc.unpatch(twin), case), logits(case.make(), case))
    assert torch.equal(logits(model, case), expected)


def test_a_pickle_is_read_in_another_process(tmp_path: Path) -> None:
    model = lc.patch(BY_NAME["llama"].make(), FIRST(BY_NAME["llama"]))
    ids = BY_NAME["llama"].prompt(40)
    torch.save((model, ids), tmp_path / "model.pt")
    code = f"""
import torch
model, ids = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
torch.save(model.generate(ids, max_new_tokens=9, do_sample=False), {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), model.generate(ids, max_new_tokens=9, do_sample=False))


@rows
def test_a_copy_of_a_cache_goes_its_own_way(row: Row) -> None:
    case = BY_NAME["llama"]
    model = lc.patch(case.make(), row.method(case))
    out = generate(model, batch(case), **REAL_TOKENS)
    mask = torch.cat((batch(case)["attention_mask"], torch.ones(2, 17, dtype=torch.long)), 1)
    questions = [torch.cat((out.sequences, case.prompt(5, rows=2, seed=seed)), 1) for seed in (3, 4)]
    for question, cache in zip(questions, (copy.deepcopy(out.past_key_values), out.past_key_values), strict=True):
        inputs = {"input_ids": question, "attention_mask": mask}
        got = generate(model, inputs, past_key_values=cache, **REAL_TOKENS).sequences
        assert torch.equal(got, generate(model, inputs, **REAL_TOKENS).sequences)
