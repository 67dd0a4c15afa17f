"""There and back: what `patch` changes, that `unpatch` leaves nothing behind, and that a failure changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import hf_longctx as lc
from hf_longctx import hooks as core_hooks

from ..methods.cases import DECODERS, LIMITS, LOSSY, Row, named, pairs
from .cases import BY_NAME
from .snapshot import differences, hooks, snapshot
from .test_generate import batch, generate
from .tiny import Case

LLAMA = BY_NAME["llama"]
ROWS = [LIMITS[0], *LOSSY]
rows = pytest.mark.parametrize("row", ROWS, ids=named)


@torch.no_grad()
def logits(model: Any, case: Case = LLAMA) -> torch.Tensor:
    out: torch.Tensor = model(case.prompt(40)).logits
    return out


def work(model: Any, case: Case) -> torch.Tensor:
    """What leaves traces on unpatched models too (the longest length, the last image's positions): always the same."""
    generate(model, batch(case))
    return logits(model, case)


@pytest.mark.parametrize(("row", "case"), pairs((LIMITS[0], *LOSSY)), ids=named)
def test_unpatch_leaves_nothing_behind(row: Row, case: Case) -> None:
    model = case.make()
    expected = work(model, case)
    before = snapshot(model)
    assert lc.patch(model, row.method(case)) is model
    assert differences(before, snapshot(model)) != []
    work(model, case)
    assert lc.unpatch(model) is model
    assert hooks(model) == 0
    assert torch.equal(work(model, case), expected)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("case", DECODERS, ids=named)
def test_patching_twice_and_unpatching_once(case: Case) -> None:
    model = case.make()
    work(model, case)
    before = snapshot(model)
    for row in (*LIMITS, *LOSSY, LIMITS[0]):
        if row.takes(case):
            lc.patch(model, row.method(case))
    assert hooks(model) == 2
    work(lc.unpatch(model), case)
    assert differences(before, snapshot(model)) == []


def test_unpatching_an_unpatched_model_does_nothing() -> None:
    model = LLAMA.make()
    before = snapshot(model)
    assert lc.unpatch(model) is model
    assert differences(before, snapshot(model)) == []


@rows
def test_patched_within_a_block(row: Row) -> None:
    model = LLAMA.make()
    before, expected = snapshot(model), logits(model)
    with lc.patched(model, row.method(LLAMA)) as same:
        assert same is model
        assert lc.report(model).plan.method == row.name
    assert differences(before, snapshot(model)) == []
    assert torch.equal(logits(model), expected)


def test_blocks_nest() -> None:
    model = LLAMA.make()
    stream, duo = (row.method(LLAMA) for row in LOSSY)
    with lc.patched(model, stream):
        plan, expected = lc.report(model).plan, logits(model)
        with lc.patched(model, duo):
            assert lc.report(model).method == "duo_attention"
        assert lc.report(model).plan == plan
        assert torch.equal(logits(model), expected)
        with pytest.raises(KeyboardInterrupt), lc.patched(model, "dense"):
            raise KeyboardInterrupt
        assert lc.report(model).plan == plan
    assert hooks(model) == 0


def test_a_block_that_fails_gives_the_model_back() -> None:
    model = LLAMA.make()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), lc.patched(model, LOSSY[0].method(LLAMA)):
        raise ZeroDivisionError
    assert differences(before, snapshot(model)) == []


def test_a_second_patch_replaces_the_plan() -> None:
    model = LLAMA.make()
    for row in ROWS:
        fresh = logits(lc.patch(LLAMA.make(), row.method(LLAMA)))
        assert torch.equal(logits(lc.patch(model, row.method(LLAMA))), fresh)
    assert hooks(model) == 2


def test_a_cache_of_the_former_plan_is_refused() -> None:
    model = lc.patch(LLAMA.make(), LOSSY[0].method(LLAMA))
    cache = model(LLAMA.prompt(10)).past_key_values
    lc.patch(model, "dense")
    with pytest.raises(TypeError, match="of plan 'dense', which is in force; got one made for plan 'streaming_llm'"):
        model(LLAMA.prompt(1), past_key_values=cache)
    lc.patch(model, LOSSY[0].method(LLAMA))
    assert model(LLAMA.prompt(1), past_key_values=cache).past_key_values.get_seq_length() == 11


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "method": ("streamin_llm", {}, ValueError, "got 'streamin_llm'. Did you mean 'streaming_llm'?"),
    "knob": ("streaming_llm", {"sink": 4}, ValueError, "got 'sink'. Did you mean 'sinks'?"),
    "knob of another": ("dense", {"window": 4}, ValueError, "among kv; got 'window'."),
    "negative": ("streaming_llm", {"sinks": -1}, ValueError, "expected sink as a whole number of tokens >= 0; got -1"),
    "zero": ("streaming_llm", {"window": 0}, ValueError, "expected window as a whole number of tokens >= 1; got 0"),
    "half": ("streaming_llm", {"window": 2.5}, ValueError, "whole number of tokens >= 1; got 2.5"),
    "share": ("duo_attention", {"sparsity": 1.5}, ValueError, "expected sparsity between 0"),
    "object": (3, {}, TypeError, "expected the name of a method, a method or a Plan; got int"),
    "both": (lc.Dense(), {"window": 3}, TypeError, "expected no knobs beside a ready-made Dense; got window"),
    "gates": ("duo_attention", {"pattern": [[0.1, 0.2]]}, ValueError, "2"),
    "NaN": ("duo_attention", {"pattern": [[0.1, float("nan")]] * 2}, ValueError, "nan"),
    "heads": ("duo_attention", {"pattern": [[0.1, 0.2, 0.3, 0.4]] * 2}, ValueError, "expected 2 KV heads"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_changes_nothing(what: str) -> None:
    method, knobs, kind, words = BAD[what]
    model = LLAMA.make()
    before = snapshot(model)
    with pytest.raises(kind) as caught:
        lc.patch(model, method, **knobs)
    assert words in str(caught.value)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("what", BAD)
def test_bad_input_keeps_the_plan_in_force(what: str) -> None:
    method, knobs, kind, _ = BAD[what]
    model = lc.patch(LLAMA.make(), LOSSY[0].method(LLAMA))
    before, expected = snapshot(model), logits(model)
    cache = model(LLAMA.prompt(10)).past_key_values
    with pytest.raises(kind):
        lc.patch(model, method, **knobs)
    assert model(LLAMA.prompt(1), past_key_values=cache).past_key_values is cache
    assert differences(before, snapshot(model)) == []
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("other", ["llama_multi_head", "llama_multi_query", "gemma3"])
def test_a_plan_for_another_model(other: str) -> None:
    case = BY_NAME[other]
    plan = lc.report(lc.patch(case.make(), "dense")).plan
    model = LLAMA.make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"expected a plan for 2 layers.*Make the plan for this model"):
        lc.patch(model, plan)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("case", [BY_NAME[name] for name in ("llama", "falcon_new", "mpt", "qwen3_vl")], ids=named)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_while_installing_changes_nothing(
    case: Case, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error

    model = case.make()
    before, expected = snapshot(model), logits(model, case)
    with monkeypatch.context() as context:
        context.setattr(core_hooks, "find_rotary", fail)
        with pytest.raises(error):
            lc.patch(model, LOSSY[0].method(case))
        assert differences(before, snapshot(model)) == []
        assert torch.equal(logits(model, case), expected)
        dense = lc.report(lc.patch(model, "dense")).plan
        with pytest.raises(error):
            lc.patch(model, LOSSY[0].method(case))
        assert lc.report(model).plan == dense
    lc.unpatch(model)
    assert differences(before, snapshot(model)) == []


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="expected a loaded transformers model; got Linear"):
        lc.patch(torch.nn.Linear(2, 2), "dense")  # type: ignore[type-var]


def test_another_implementation_chosen_while_patched() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    model.get_decoder().set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match=r"got 'eager'. Call hf_longctx.unpatch\(model\) before you choose another"):
        logits(model)
    lc.unpatch(model)
    assert model.config._attn_implementation == "eager"  # what the user chose stays chosen
    eager = LLAMA.make()
    eager.set_attn_implementation("eager")
    assert torch.equal(logits(model), logits(eager))


def test_an_implementation_chosen_for_the_whole_model_holds_after_unpatch() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    model.set_attn_implementation("eager")
    lc.unpatch(model)
    assert model.config is model.get_decoder().config
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_the_implementation_comes_back(name: str) -> None:
    model = LLAMA.make()
    model.set_attn_implementation(name)
    expected = logits(model)
    lc.unpatch(lc.patch(model, "dense"))
    assert model.config._attn_implementation == name
    assert torch.equal(logits(model), expected)


# interrupted calls ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@rows
def test_an_interrupted_call_spoils_its_cache_until_reset(row: Row, error: type[BaseException]) -> None:
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    cache = model(LLAMA.prompt(20)).past_key_values
    fail = {"now": True}

    def stop(*_: Any) -> None:
        if fail["now"]:
            raise error

    hook = model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(error):
        model(LLAMA.prompt(5), past_key_values=cache)
    fail["now"] = False
    with pytest.raises(RuntimeError, match=r"got one that was interrupted.*Call cache.reset\(\)"):
        model(LLAMA.prompt(5), past_key_values=cache)
    expected = logits(lc.patch(LLAMA.make(), row.method(LLAMA)))
    assert torch.equal(logits(model), expected)
    cache.reset()
    assert (cache.get_seq_length(), cache.kv_bytes) == (0, 0)
    assert torch.equal(model(LLAMA.prompt(40), past_key_values=cache).logits, expected)
    hook.remove()
    assert torch.equal(logits(lc.unpatch(model)), logits(LLAMA.make()))


# what is written and imported -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [BY_NAME[name] for name in ("llama", "falcon_new", "mpt", "qwen3_vl")], ids=named)
def test_a_saved_model_knows_nothing_of_us(case: Case, tmp_path: Path) -> None:
    case.make().save_pretrained(tmp_path / "stock")
    lc.patch(case.make(), LOSSY[0].method(case)).save_pretrained(tmp_path / "patched")
    for file in sorted((tmp_path / "stock").iterdir()):
        assert file.read_bytes() == (tmp_path / "patched" / file.name).read_bytes()
    assert len(list((tmp_path / "patched").iterdir())) == len(list((tmp_path / "stock").iterdir()))
    auto = hf.AutoModelForImageTextToText if case.text_config else hf.AutoModelForCausalLM
    assert torch.equal(logits(auto.from_pretrained(tmp_path / "patched"), case), logits(case.make(), case))


def test_importing_registers_nothing() -> None:
    code = """
import json, transformers, torch
from transformers import AttentionInterface, AttentionMaskInterface
from torch.nn.modules import module
def known():
    return [sorted(AttentionInterface._global_mapping), sorted(AttentionMaskInterface._global_mapping),
            len(module._global_forward_hooks), len(module._global_forward_pre_hooks), torch.cuda.is_initialized()]
before = known()
stock = transformers.GenerationMixin.__dict__.copy()
import hf_longctx
print(json.dumps([before == known(), stock == transformers.GenerationMixin.__dict__.copy()]))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout.splitlines()[-1]) == [True, True]
