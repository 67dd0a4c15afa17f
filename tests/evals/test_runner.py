from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import hf_longctx as lc
from hf_longctx.evals import needle, passkey, runner, tables
from hf_longctx.evals.respond import Ticks, respond
from hf_longctx.evals.ruler import run as ruler
from hf_longctx.evals.runner import Options, Row

METHODS = "streaming_llm(sinks=2,window=60)"


def grid(tiny: tuple[Any, Any], out: Path | None = None, methods: str = METHODS, **options: Any) -> list[Row]:
    depths = options.pop("depths", [0.0, 1.0])
    lengths = options.pop("lengths", [280, 300])
    return needle.run(*tiny, methods, lengths, depths, new_tokens=3, options=Options(out=out, chunk=64, **options))


def unpatched(model: Any) -> bool:
    return not any(name.startswith("_hf_longctx") for name in vars(model))


def test_dense_runs_first_and_stands_in_every_row(tiny: tuple[Any, Any]) -> None:
    rows = grid(tiny)
    assert [row.method for row in rows] == ["dense"] * 4 + [METHODS] * 4
    assert [(row.length, row.depth) for row in rows[:4]] == [(280, 0.0), (280, 1.0), (300, 0.0), (300, 1.0)]
    for dense, row in zip(rows[:4], rows[4:], strict=True):
        assert (row.seed, row.expected) == (dense.seed, dense.expected)
        for each in (dense, row):
            base = (each.dense_score, each.dense_prefill_s, each.dense_token_ms)
            assert base == (dense.score, dense.prefill_s, dense.token_ms)
        assert row.kv_bytes < dense.kv_bytes
        assert row.dense_kv_bytes == dense.dense_kv_bytes == 2 * 2 * 2 * 16 * 4 * (row.length + 2)
        assert row.prefill_s > 0
        assert row.density is None
    assert unpatched(tiny[0])


def test_without_a_baseline_there_is_none(tiny: tuple[Any, Any]) -> None:
    rows = grid(tiny, baseline=False, lengths=[280])
    assert {row.method for row in rows} == {METHODS}
    assert {(row.dense_score, row.dense_prefill_s, row.dense_token_ms) for row in rows} == {(None, None, None)}


def test_the_trials_of_a_run_do_not_depend_on_which_others_there_are(tiny: tuple[Any, Any]) -> None:
    small, large = grid(tiny, lengths=[300], depths=[1.0], methods="dense"), grid(tiny, methods="dense")
    assert [(row.seed, row.answer) for row in small] == [(row.seed, row.answer) for row in large[3:]]
    other = grid(tiny, lengths=[300], depths=[1.0], methods="dense", seed=1)
    assert other[0].expected != small[0].expected


def test_prompts_that_run_together_get_the_answers_and_bytes_of_prompts_alone(tiny: tuple[Any, Any]) -> None:
    alone, together = grid(tiny, depths=[0, 0.5, 1]), grid(tiny, depths=[0, 0.5, 1], batch=2)
    assert [row.batch for row in together] == [2, 2, 1] * 4
    for a, b in zip(alone, together, strict=True):
        assert (a.answer, a.score, a.kv_bytes, a.dense_kv_bytes) == (b.answer, b.score, b.kv_bytes, b.dense_kv_bytes)


def test_an_answer_is_what_generate_writes_and_its_clock_ticks_for_every_token(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    ids = torch.randint(5, 300, (2, 90), generator=torch.Generator().manual_seed(0))
    stock = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    clock = Ticks()
    with lc.patched(model, "dense"):
        answers = respond(model, tokenizer, ids, 4, 32, clock)
        [single] = respond(model, tokenizer, ids[:1], 1, 32)
    assert [answer.text for answer in answers] == tokenizer.batch_decode(stock[:, 90:], skip_special_tokens=True)
    assert len(clock.times) == 5
    assert clock.times == sorted(clock.times)
    assert single.token_ms is None


def test_the_density_is_that_of_the_report(tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = lc.report
    monkeypatch.setattr(lc, "report", lambda model: SimpleNamespace(**{**vars(real(model)), "density": 0.25}))
    assert {row.density for row in grid(tiny, lengths=[280])} == {0.25}


def test_an_interrupted_run_goes_on_where_it_was(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    whole = grid(tiny, tmp_path)
    path = tmp_path / "needle.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    assert [Row(**json.loads(line)) for line in lines] == whole
    path.write_bytes(b"".join(lines[:3]) + lines[3][:40])
    again = grid(tiny, tmp_path, resume=True)
    assert again[:3] == whole[:3]  # times included: they did not run again
    assert again[3].prefill_s != whole[3].prefill_s
    assert [(row.method, row.seed, row.answer) for row in again] == [(r.method, r.seed, r.answer) for r in whole]
    assert [Row(**json.loads(line)) for line in path.read_bytes().splitlines()] == again
    about = json.loads((tmp_path / "run_meta.json").read_text())["needle"]
    assert len(about["resumed"]) == 1
    assert about["versions"]["torch"] == torch.__version__


def test_a_resumed_run_may_add_methods_and_lengths(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    first = grid(tiny, tmp_path, lengths=[280], methods="dense")
    more = grid(tiny, tmp_path, resume=True)
    assert more[:2] == first
    assert len(more) == 8
    assert grid(tiny, tmp_path, lengths=[280], methods="dense", resume=True) == first


def test_what_stops_in_the_middle_leaves_whole_lines_and_an_unpatched_model(
    tiny: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def stop(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return respond(*args, **kwargs)

    monkeypatch.setattr(runner, "respond", stop)
    with pytest.raises(KeyboardInterrupt):
        grid(tiny, tmp_path)
    assert unpatched(tiny[0])
    content = (tmp_path / "needle.jsonl").read_text()
    assert len([json.loads(line) for line in content.splitlines()]) == 2  # one call of four warmed up
    assert content.endswith("\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed=1; got 0"),
        ({"batch": 2}, "batch=2; got 1"),
        ({"baseline": False}, "baseline=False; got True"),
    ],
)
def test_a_run_of_other_settings_is_refused_and_changes_nothing(
    tiny: tuple[Any, Any], tmp_path: Path, change: dict[str, int], said: str
) -> None:
    grid(tiny, tmp_path, lengths=[280], methods="dense")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=rf"--resume: expected .*needle.jsonl to be made with {said}"):
        grid(tiny, tmp_path, resume=True, **change)
    with pytest.raises(ValueError, match="expected no former rows"):
        grid(tiny, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_damaged_line_is_named(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    grid(tiny, tmp_path, lengths=[280], methods="dense")
    path = tmp_path / "needle.jsonl"
    path.write_bytes(b"{oops\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"JSON object in line 1 of .*needle\.jsonl"):
        grid(tiny, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("methods", "said"),
    [("dense,duo_attention", "duo_attention: expected a published head pattern"), ("dense,nonesuch", "nonesuch")],
)
def test_a_method_that_cannot_be_is_refused_before_anything_runs(
    tiny: tuple[Any, Any], tmp_path: Path, methods: str, said: str
) -> None:
    with pytest.raises((ValueError, lc.UnsupportedError), match=said):
        grid(tiny, tmp_path / "out", methods=methods)
    assert not (tmp_path / "out").exists()
    assert unpatched(tiny[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lengths": [280, 20]}, "length of at least"),
        ({"depths": [0.5, 1.5]}, "depth from 0 to 1"),
    ],
)
def test_a_prompt_that_cannot_be_built_is_refused_before_anything_runs(
    tiny: tuple[Any, Any], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        grid(tiny, tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [{"chunk": 0}, {"batch": 0}])
def test_options_that_are_none_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: expected at least 1; got 0"):
        Options(**bad)


def test_three_evaluations_share_a_folder(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    options = Options(out=tmp_path, chunk=64)
    grid(tiny, tmp_path, lengths=[280])
    keys = passkey.run(*tiny, METHODS, [280], 3, new_tokens=2, options=options)
    assert len({row.depth for row in keys}) == 3
    families = ruler(*tiny, METHODS, ["niah_single", "fwe"], [900], 1, options=options)
    assert [(row.method, row.task) for row in families[2:]] == [(METHODS, "niah_single"), (METHODS, "fwe")]
    about = json.loads((tmp_path / "run_meta.json").read_text())
    assert set(about) == {"needle", "passkey", "ruler"}
    assert about["passkey"]["settings"]["text"] == "shipped"
    names = {f"{name}{end}" for name in about for end in (".jsonl", "_summary.json")}
    assert {path.name for path in tmp_path.iterdir()} == names | {"needle.png", "run_meta.json"}


def test_summaries_are_means_and_the_table_shows_them(tiny: tuple[Any, Any]) -> None:
    row = grid(tiny, lengths=[280], depths=[0.5], methods="dense")[0]
    rows = [
        replace(row, method=method, length=length, trial=trial, score=score, density=density, token_ms=10.0)
        for method, density in (("dense", None), ("half", 0.5))
        for length in (512, 1024)
        for trial, score in enumerate((1.0, 0.0, 1.0, 1.0))
    ]
    found = tables.summarize(rows)
    assert [(s.method, s.length, s.trials, s.score, s.density) for s in found] == [
        ("dense", 512, 4, 0.75, None),
        ("dense", 1024, 4, 0.75, None),
        ("half", 512, 4, 0.75, 0.5),
        ("half", 1024, 4, 0.75, 0.5),
    ]
    console = Console(width=100)
    with console.capture() as shown:
        console.print(tables.table(found, "Title"))
    for words in ("Title", "1,024", "75.0%", "keys read", "50.0%", "10.0 ms", "Costs are those of 1,024 tokens"):
        assert words in shown.get()


def test_the_heat_map_has_a_cell_for_every_length_and_depth_and_shows_what_is_missing(
    tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    rows = grid(tiny)
    needle.plot(rows[:-1], tmp_path / "a.png")
    needle.plot([replace(row, method=f"{row.method}{i}") for i in range(4) for row in rows], tmp_path / "b.png")
    sizes = []
    for name in ("a.png", "b.png"):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        sizes.append(int.from_bytes(content[20:24], "big"))
    assert sizes[1] > 2 * sizes[0]  # eight panels are three rows


def test_spread() -> None:
    assert needle.spread(5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert needle.spread(1) == [0.5]
    with pytest.raises(ValueError, match="depths: expected at least 1"):
        needle.spread(0)
