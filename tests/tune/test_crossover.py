"""`hf-longctx tune crossover` from the command line to the plan that `Auto` makes of what it found."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_longctx as lc
from hf_longctx.machine import device_name
from hf_longctx.methods import Auto
from hf_longctx.models import ModelFacts, inspect_model
from hf_longctx.tune.crossover import cached_path, read_crossover

from ..evals import tiny_folder
from ..integration.cases import BY_NAME

LENGTHS = (4096, 8192, 16384, 32768)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own."""
    monkeypatch.setenv("HF_LONGCTX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def facts() -> ModelFacts:
    return inspect_model(BY_NAME["llama_multi_query"].make())


def measured(quest: list[float], xattention: list[float], dense: float = 10.0, **changed: Any) -> dict[str, Any]:
    """A file in which dense takes `dense` ms a token and seconds a prompt, and the candidates what is given."""
    here = facts()
    rows = []
    for length, token_ms, prefill_s in zip(LENGTHS, quest, xattention, strict=True):
        for method, times in (("dense", (dense, dense)), ("quest", (dense, token_ms)), ("xattention", (prefill_s, 10))):
            spread = {"prefill_s": [times[0], times[0] + 0.5], "token_ms": [times[1], times[1] + 0.5]}
            rows.append({"method": method, "length": length, **spread})
    about = {"family": here.family, "device": here.device, "dtype": here.dtype, "model": "m", "budget": 4096}
    return {"method": "crossover", **about, "rows": rows, "meta": {}, **changed}


# what follows from times ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quest", "first"),
    [
        ([1, 2, 3, 4], 8192),  # at 4,096 quest reads all that dense reads
        ([1, 20, 3, 4], 16384),
        ([1, 2, 30, 4], 32768),
        ([1, 2, 3, 40], None),
        ([1, 9.5, 3, 4], 16384),  # its slower run is as slow as the faster one of dense
        ([1, 9.4, 3, 4], 8192),
    ],
)
def test_a_candidate_is_faster_from_where_it_is_at_all_longer_lengths(quest: list[float], first: int | None) -> None:
    assert read_crossover(measured(quest, [20] * 4)).faster_from("quest") == first


def test_prompts_count_for_xattention_alone_at_all_lengths() -> None:
    found = read_crossover(measured([20] * 4, [1, 2, 3, 4]))
    assert (found.faster_from("xattention"), found.faster_from("quest")) == (4096, None)
    assert found.took("xattention", 32768, "prefill_s") == 4.25
    assert read_crossover(found.to_json() | {"rows": measured([20] * 4, [1, 2, 3, 4])["rows"]}) == found


# plans ----------------------------------------------------------------------------------------------------------------


def selectors(plan: lc.Plan) -> tuple[lc.Selector | None, lc.Selector | None]:
    """Of the last layer."""
    (group,) = plan.layers[-1].groups
    return group.policy.prefill, group.policy.decode


def test_unmeasured_it_says_so() -> None:
    plan = Auto().plan(facts())
    assert plan.method == "auto: quest"
    assert "was not measured on this device" in plan.why
    assert selectors(plan) == selectors(lc.Quest(4096).plan(facts()))


@pytest.mark.parametrize(
    ("quest", "xattention", "name", "starts"),
    [
        ([20, 20, 3, 4], [20, 2, 3, 4], "auto: xattention + quest", (8192, 16384)),
        ([20, 20, 3, 4], [20] * 4, "auto: quest", (None, 16384)),
        ([20] * 4, [1, 2, 3, 4], "auto: xattention", (4096, None)),
        ([20] * 4, [20] * 4, "auto: dense", (None, None)),
    ],
)
@pytest.mark.parametrize("given_as", ["dict", "path", "cache"])
def test_each_method_is_used_from_where_it_was_faster(
    quest: Any, xattention: Any, name: str, starts: Any, given_as: str, tmp_path: Path
) -> None:
    raw, here = measured(quest, xattention), facts()
    path = cached_path(here.family, here.device, here.dtype) if given_as == "cache" else tmp_path / "c.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(raw))
    plan = Auto(kv="int8", crossover={"dict": raw, "path": path, "cache": None}[given_as]).plan(here)
    assert plan.method == name
    assert tuple(None if s is None else s.dense_below for s in selectors(plan)) == starts
    assert {group.policy.kv for layer in plan.layers for group in layer.groups} == {lc.Int8KV()}
    assert plan.layers[0].groups[0].policy.decode is None  # quest's first layers are dense
    assert f"measured on {here.device} with m, float32: quest decodes" in plan.why
    assert f"(at 32,768: {quest[-1] + 0.25:.3g} ms a token, dense 10.2)" in plan.why
    assert f"(at 32,768: {xattention[-1] + 0.25:.3g} s, dense 10.2)" in plan.why
    assert ("quest decodes no faster" in plan.why) == (starts[1] is None)
    assert ("xattention reads prompts no faster" in plan.why) == (starts[0] is None)


def test_the_report_says_what_and_why() -> None:
    model = lc.patch(BY_NAME["llama_multi_query"].make(), "auto", crossover=measured([20, 2, 3, 4], [20] * 4))
    said = str(lc.report(model))
    assert "auto: quest: 3 attention layers" in said
    assert "quest decodes faster from 8,192 tokens on (at 32,768: 4.25 ms a token, dense 10.2)" in said
    assert "all before 8192" in said


def test_short_texts_are_dense_bit_for_bit() -> None:
    case = BY_NAME["llama_multi_query"]
    expected = lc.patch(case.make(), "dense")(case.prompt(60)).logits
    model = lc.patch(case.make(), Auto(crossover=measured([20, 2, 3, 4], [20, 2, 3, 4])))
    assert torch.equal(model(case.prompt(60)).logits, expected)


def test_a_kept_measurement_of_another_budget_is_none() -> None:
    here = facts()
    path = cached_path(here.family, here.device, here.dtype)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(measured([20, 2, 3, 4], [20] * 4)))
    assert "was not measured on this device" in Auto(budget=2048).plan(here).why
    with pytest.raises(ValueError, match=re.escape(f"{path}: expected times for a budget of 2048; got 4096. Use")):
        Auto(budget=2048, crossover=path).plan(here)


@pytest.mark.parametrize("name", ["family", "device", "dtype"])
def test_times_of_something_else_are_refused(name: str) -> None:
    method = Auto(crossover=measured([1] * 4, [1] * 4, **{name: "other"}))
    mine = re.escape(getattr(facts(), name))
    with pytest.raises(ValueError, match=rf"crossover: expected times for {name} '{mine}'; got 'other'"):
        method.plan(facts())


GOOD = measured([1] * 4, [1] * 4)
BAD: list[tuple[str, str]] = [
    ("{", "expected JSON"),
    ("[1]", "expected a measurement of times"),
    ("null", "expected a measurement of times"),
    (json.dumps({**GOOD, "method": "xattention"}), "expected a measurement of 'crossover'; got one of 'xattention'"),
    (json.dumps({key: value for key, value in GOOD.items() if key != "budget"}), "got KeyError('budget')"),
    (json.dumps({**GOOD, "budget": 4096.0}), "4096.0 in place of a whole number"),
    (json.dumps({**GOOD, "rows": []}), "expected times of dense, quest, xattention, each once at every length"),
    (json.dumps({**GOOD, "rows": GOOD["rows"][1:]}), "each once at every length"),
    (json.dumps({**GOOD, "rows": GOOD["rows"] * 2}), "each once at every length"),
    (json.dumps({**GOOD, "rows": [{**row, "token_ms": [0]} for row in GOOD["rows"]]}), "expected token_ms > 0; got 0"),
    (json.dumps({**GOOD, "rows": [{**row, "token_ms": []} for row in GOOD["rows"]]}), "token_ms > 0; got none"),
    (
        json.dumps({**GOOD, "rows": [{**row, "prefill_s": 1} for row in GOOD["rows"]]}),
        "1 in place of a list of",
    ),
    (json.dumps({**GOOD, "rows": [{**row, "prefill_s": [float("nan")]} for row in GOOD["rows"]]}), "got nan"),
]


@pytest.mark.parametrize(("content", "words"), BAD, ids=[words[-30:] for _, words in BAD])
def test_bad_files_are_refused_by_name(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(path))}.*{re.escape(words)}"):
        Auto(crossover=path)
    with pytest.raises(FileNotFoundError, match=r"crossover: expected a JSON file; got .*nowhere.json"):
        Auto(crossover=tmp_path / "nowhere.json")


# the command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a third layer, so that quest has one to choose in."""
    path = tiny_folder.save(tmp_path_factory.mktemp("tiny-llama"))
    config = AutoModelForCausalLM.from_pretrained(path).config
    config.num_hidden_layers = 3
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


@pytest.fixture
def tune(folder: Path, call: Any) -> Any:
    return lambda *args, model=str(folder): call("tune", "crossover", "-m", model, *args)


def test_what_is_measured_is_what_auto_finds(tune: Any, folder: Path, cache: Path) -> None:
    code, out, err = tune("--lengths", "300,160", "--budget", "64")
    assert code == 0, err
    model = AutoModelForCausalLM.from_pretrained(folder)
    (path,) = cache.rglob("*.json")
    assert path == cached_path("llama", device_name(model.device), "float32")
    assert path.parent == cache / "crossover"
    found = read_crossover(path)
    assert (found.model, found.budget, found.lengths) == (folder.name, 64, [160, 300])
    assert {(len(row.prefill_s), len(row.token_ms)) for row in found.rows} == {(3, 3)}
    assert found.meta["settings"]["lengths"] == [300, 160]
    assert "versions" in found.meta
    assert str(folder.parent) not in path.read_text()
    assert found.describe() in out
    assert all(f"{found.took(row.method, row.length, 'token_ms'):,.3f}" in out for row in found.rows)
    assert lc.report(lc.patch(model, "auto", budget=64)).plan.why == found.describe()
    assert "not measured" in lc.report(lc.patch(model, "auto")).plan.why


def test_a_file_of_ones_own_leaves_the_cache_alone(tune: Any, tmp_path: Path, cache: Path) -> None:
    code, _, err = tune("--lengths", "160", "--budget", "64", "-o", str(tmp_path / "new" / "c.json"))
    assert code == 0, err
    assert read_crossover(tmp_path / "new" / "c.json").lengths == [160]
    assert not cache.exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--lengths", "4kb"), "expected tokens such as 1k,2k,4096; got '4kb'"),
        (("--lengths", "1k,4k"), "tune crossover: expected a length above the budget of 4096"),
        (("--budget", "100"), "Quest: expected token_budget as whole pages of 16"),
        (("--text", "nowhere.txt"), "nowhere.txt, which does not exist"),
        (("--device", "toaster"), "device: expected"),
    ],
)
def test_a_mistake_is_refused_before_the_model_is_looked_for(tune: Any, args: tuple[str, ...], said: str) -> None:
    code, _, err = tune(*args, model="./no-such-folder")
    assert code == 1
    assert said in err
    assert "no-such-folder" not in err


def test_names_of_files_are_plain(cache: Path) -> None:
    path = cached_path("qwen2", "NVIDIA H100 80GB HBM3", "bfloat16")
    assert path == cache / "crossover" / "nvidia-h100-80gb-hbm3-qwen2-bfloat16.json"
    here = replace(facts(), device="cpu (2 threads)")
    assert cached_path(here.family, here.device, here.dtype).name == "cpu-2-threads-llama-float32.json"
