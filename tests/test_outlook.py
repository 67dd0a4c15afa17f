"""`plan(model, context=...)` against bytes that were measured, and `auto`, which takes what it recommends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import hf_longctx as lc
from hf_longctx.methods import METHODS, Auto, fitting
from hf_longctx.methods import auto as auto_module
from hf_longctx.models import inspect_model
from hf_longctx.outlook import weight_bytes
from hf_longctx.patch import state_of

from .integration.cases import BY_NAME

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
LLAMA = BY_NAME["llama"]


def llama_8b() -> Any:
    """The shapes that the prefill benchmark ran, without memory."""
    config = hf.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1 << 20,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        return hf.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("duo_attention", "lserve")])
@torch.no_grad()
def test_keys_and_values_are_within_5_percent_of_those_held(name: str) -> None:
    model = LLAMA.make()
    told = lc.plan(model, context=2049, batch=2)
    lc.patch(model, name).generate(LLAMA.prompt(2048, rows=2), max_new_tokens=2, do_sample=False)
    seen = lc.report(model)
    assert seen.tokens_seen == 2049
    assert told.rows[name].kv == pytest.approx(seen.kv_bytes, rel=0.05)
    assert told.rows[name].host == pytest.approx(seen.host_bytes, rel=0.05)


@pytest.mark.parametrize("heads", ["duo_attention", "lserve"])
@torch.no_grad()
def test_so_are_those_of_heads_that_stream(heads: str) -> None:
    from hf_longctx.forecast import forecast

    model = LLAMA.make()
    method = METHODS[heads](pattern=((0.9, 0.1), (0.1, 0.9)))
    told = forecast(inspect_model(model), method.plan(inspect_model(model)), 2048, 1)
    cache = lc.patch(model, method)(LLAMA.prompt(2048)).past_key_values
    assert told.kv == pytest.approx(cache.kv_bytes, rel=0.05)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "auto"])
@pytest.mark.parametrize(("kv", "rows"), [("int4", 3), ("int8", 1)])
@torch.no_grad()
def test_so_are_those_of_few_bits_and_several_rows(name: str, kv: str, rows: int) -> None:
    from hf_longctx.forecast import forecast

    model = LLAMA.make()
    knobs = {"pattern": ((0.9, 0.1), (0.1, 0.9))} if name in ("duo_attention", "lserve") else {}
    lc.patch(model, name, kv=kv, **knobs)
    told = forecast(inspect_model(model), lc.report(model).plan, 2048, rows)
    cache = model(LLAMA.prompt(2048, rows=rows)).past_key_values
    seen = lc.report(model)
    assert (seen.tokens_seen, seen.kv_bytes) == (2048, cache.kv_bytes)
    assert told.kv == pytest.approx(seen.kv_bytes, rel=0.05)
    assert told.host == pytest.approx(seen.host_bytes, rel=0.05)
    assert told.kv < 0.8 * seen.dense_kv_bytes


def test_what_many_rows_hold_at_a_time() -> None:
    """Keys and values of all of them, beside what a layer computes for some, where a prompt is read so."""
    from hf_longctx.forecast import forecast, work_bytes

    facts = inspect_model(LLAMA.make())
    for name, tokens in (("dense", 16 * 1024), ("streaming_llm", 64 * 1024)):
        told = forecast(facts, METHODS[name]().plan(facts), 1024, 64)
        assert told.work == work_bytes(facts, tokens, torch.float32)


def test_weights_are_counted_once() -> None:
    config = hf.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)  # fmt: skip
    tied = hf.LlamaForCausalLM(config)
    storages = {x.untyped_storage().data_ptr(): x.nbytes for x in (*tied.parameters(), *tied.buffers())}
    assert weight_bytes(tied) == sum(storages.values())


def test_the_most_memory_is_that_which_a_gpu_held() -> None:
    """Prompts of 128K tokens, read in pieces and, unpatched, at once."""
    rows = json.loads((RESULTS / "prefill-generate-h200.json").read_text())["rows"]
    (row,) = (row for row in rows if row["case"] == "peak memory at 128K, dense plan")
    told = lc.plan(llama_8b(), context=131072, memory="141GB")
    assert told.peak("dense") / 1e9 == pytest.approx(row["value"], rel=0.05)
    assert told.unpatched / 1e9 == pytest.approx(row["baseline_value"], rel=0.05)


def test_a_step_reads_what_the_method_says() -> None:
    told = lc.plan(llama_8b(), context=131072, memory="141GB").rows
    a_token = 2 * 2 * 32 * 8 * 128
    assert told["dense"].reads == told["dense"].kv == 131072 * a_token
    pages = 2048 + 131072 // 16  # the budget, and two bounds a page that are as long as a token's key and value
    assert told["quest"].reads == pytest.approx((pages * 30 + 131072 * 2) / 32 * a_token, rel=0.02)
    assert told["streaming_llm"].reads == 1024 * a_token
    assert (told["dense"].less_from, told["streaming_llm"].less_from, told["quest"].less_from) == (None, 2048, 4096)


def test_nothing_is_patched_and_reasons_are_kept() -> None:
    model = LLAMA.make()
    told = lc.plan(model, context=1024, memory="1GiB")
    assert state_of(model) is None
    assert set(told.rows) | set(told.refused) == set(METHODS)
    assert "pattern" in told.refused["duo_attention"]
    text = str(told)
    assert all(name in text for name in METHODS)
    assert 'recommended: patch(model, "' in text
    plain = json.loads(json.dumps(told.to_json()))
    assert plain["rows"]["quest"]["peak"] == told.peak("quest")
    assert plain["rows"]["quest"]["fits"] is told.fits("quest")
    assert (plain["refused"], plain["recommended"], plain["weights"]) == (told.refused, told.recommended, told.weights)


@pytest.mark.parametrize(
    ("memory", "taken"),
    [("141GB", "auto"), ("32GiB", "auto, kv='int8'"), ("19.5GiB", "inf_llm"), ("17GiB", "streaming_llm")],
)
def test_what_fits_is_recommended_and_is_what_auto_takes(
    memory: str, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama_8b()
    told = lc.plan(model, context=131072, memory=memory)
    assert told.recommended == taken
    free = told.memory - told.weights
    monkeypatch.setattr(auto_module, "available_beside", lambda facts: free)
    plan = Auto(context=131072).plan(inspect_model(model))
    assert plan.why == told.why
    assert plan.layers == fitting.first_that_fits(inspect_model(model), Auto(), 131072, 1, free).plan.layers
    assert plan.method.startswith("auto: ")


def test_beyond_the_trained_length_positions_stay_small() -> None:
    model = LLAMA.make()
    trained = model.config.max_position_embeddings
    assert lc.plan(model, context=trained, memory="1GiB").recommended == "auto"
    assert lc.plan(model, context=trained + 1, memory="1GiB").recommended == "inf_llm"


def test_nothing_that_fits_is_said_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    told = lc.plan(llama_8b(), context=131072, memory="15GiB")
    assert told.recommended is None
    assert "'streaming_llm', which holds least, needs" in told.why
    assert not any(map(told.fits, told.rows))
    model = LLAMA.make()
    monkeypatch.setattr(auto_module, "available_beside", lambda facts: 1000)
    with pytest.raises(MemoryError, match="auto: expected room for 4,096 tokens"):
        lc.patch(model, "auto", context=4096)
    assert state_of(model) is None


def test_a_measurement_takes_the_place_of_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_longctx.tune.crossover import cached_path

    monkeypatch.setenv("HF_LONGCTX_CACHE", str(tmp_path))
    model = LLAMA.make()
    facts = inspect_model(model)
    times = {"dense": (9.0, 9.0), "quest": (9.5, 5.0), "xattention": (10.0, 9.0)}
    rows = [
        {"method": name, "length": length, "prefill_s": [ms if length < 8192 or name != "xattention" else 4.0],
         "token_ms": [ms if length >= 8192 or name != "quest" else 9.5]}
        for name, (_, ms) in times.items() for length in (4096, 8192)
    ]  # fmt: skip
    path = cached_path(facts.family, facts.device, facts.dtype)
    path.parent.mkdir(parents=True)
    about = {"model": "tiny", "family": facts.family, "device": facts.device, "dtype": facts.dtype, "budget": 4096}
    path.write_text(json.dumps({"method": "crossover", **about, "rows": rows, "meta": {}}))
    told = lc.plan(model, context=256, memory="1GiB")
    assert told.measured == {"quest": 8192, "xattention": 8192}
    assert "8,192 (measured)" in str(told)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"context": 0}, "plan: expected context"),
        ({"batch": 1.5}, "plan: expected batch"),
        ({"memory": "much"}, "plan: expected memory as a number of bytes or like '32GiB'; got 'much'"),
    ],
)
def test_what_makes_no_sense_is_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        lc.plan(LLAMA.make(), **knobs)
    with pytest.raises(ValueError, match="Auto: expected context"):
        Auto(context=-1)
