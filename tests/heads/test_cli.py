"""The commands `hf-longctx heads ...`, from model to scores, lost answers, maps and gates."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import hf_longctx as lc
from hf_longctx.heads import detect, load_pattern, train
from hf_longctx.heads.scores import HeadScores, load_scores, save_scores


@pytest.fixture
def run(call: Any) -> Any:
    return partial(call, "heads")


GRID = ("--lengths", "280", "--depths", "2", "--trials", "2", "--batch", "4", "--new-tokens", "6")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ("detect", "ablate", "show", "convert")),
        (("detect",), ("--forced", "--needles", "--chat", "--mode", "--resume")),
        (("train",), ("--steps", "--rate", "--recompute", "--hold", "--mode", "--shortest", "--resume", "accelerate")),
        (("ablate",), ("--scores", "--control", "--phases", "--window")),
        (("show",), ("--top", "PNG")),
        (("convert",), ("--kv-heads", "--reduce")),
    ],
)
def test_help_names_the_options(run: Any, command: tuple[str, ...], words: tuple[str, ...]) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert [word for word in words if word not in out] == []


def test_from_a_model_to_scores_to_gates(
    run: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detect, "_RIGHT", -1.0)  # a random model answers nothing rightly: keep all
    path = tmp_path / "scores.json"
    code, out, err = run("detect", "-m", str(folder), *GRID, "-o", str(path))
    assert code == 0, err
    assert "4 of 4 trials kept" in out
    scores = load_scores(path)
    assert (scores.count, len(scores.trials)) == (4, 8)
    told = json.loads((tmp_path / "scores_summary.json").read_text())
    assert told["kv_heads"] == [2, 2]
    assert [(cell["depth"], cell["kept"], cell["trials"]) for cell in told["cells"]] == [(0.0, 2, 2), (1.0, 2, 2)]
    assert [each["mean"] for each in told["heads"]] == list(scores.means.values())
    assert all(0 < each["top_share"] <= 1 for each in told["heads"])
    assert run("detect", "-m", str(folder), *GRID, "-o", str(path), "--resume")[0] == 0
    assert load_scores(path) == scores
    code, out, err = run("convert", str(path), "--to", "duo", "-o", str(tmp_path / "pattern"))
    assert code == 0, err
    gates = load_pattern(tmp_path / "pattern").gates
    assert gates[1][0] == max(scores.means[1, 0], scores.means[1, 1])
    code, out, err = run("show", str(path), str(tmp_path / "pattern"), "-o", str(tmp_path / "map.png"))
    assert code == 0, err
    assert "over 4 KV heads, 4 of the top 4 in common" in out
    assert (tmp_path / "map.png").stat().st_size > 5_000


TRAIN = ("--steps", "4", "--keys", "1", "--words", "2", "--sink", "2", "--window", "6", "--shortest", "200")


def test_from_a_model_to_gates_that_duo_attention_loads(
    run: Any, folder: Path, tmp_path: Path, tiny: tuple[Any, Any]
) -> None:
    args = ("train", "-m", str(folder), "-o", str(tmp_path), *TRAIN, "--longest", "240", "--device", "cpu")
    code, out, err = run(*args, "--mode", "code", "--accumulate", "2", "--save-every", "2")
    assert code == 0, err
    assert "4/4 loss" in out
    assert "0 of 4 KV heads have a gate below 0.5" in out
    told = json.loads((tmp_path / "run_meta.json").read_text())["train"]["settings"]
    assert (told["mode"], told["longest"], told["accumulate"], told["text"]) == ("code", 240, 2, "shipped")
    gates = load_pattern(tmp_path).gates
    assert all(0.5 < gate <= 1 for row in gates for gate in row)
    assert len({gate for row in gates for gate in row}) > 1
    plan = lc.report(lc.patch(tiny[0], lc.DuoAttention(pattern=tmp_path))).method
    assert plan == "duo_attention"
    code, _, err = run(*args)
    assert code == 1
    assert "Pass --resume to go on from it, or another folder" in err


def test_where_nothing_is_asked_for_lessons_are_as_long_as_the_model_was_made_for(tiny: tuple[Any, Any]) -> None:
    assert train.longest_for(tiny[0], 100) == 512
    assert train.longest_for(tiny[0], 700) == 700
    tiny[0].config.max_position_embeddings = 1 << 20
    assert train.longest_for(tiny[0], 100) == 32000


def test_a_model_that_never_answers_is_said_to_and_no_scores_are_written(
    run: Any, folder: Path, tmp_path: Path
) -> None:
    code, _, err = run("detect", "-m", str(folder), *GRID, "--forced", "-o", str(tmp_path / "scores.json"))
    assert code == 1
    assert "expected a right answer; got none in 4 trials" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run_meta.json", "scores.jsonl"]


def test_ablate_shows_what_is_lost_beside_random_heads(run: Any, folder: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    save_scores(HeadScores({(n, h): (float(h),) for n in range(2) for h in range(4)}), scores)
    args = ("ablate", "-m", str(folder), "--scores", str(scores), "--lengths", "300", "--depths", "2", "--batch", "4")
    code, out, err = run(*args, "--top", "2", "--seeds", "2", "--tasks", "needle,qa", "-o", str(tmp_path / "o"))
    assert code == 0, err
    assert all(word in out for word in ("passkey", "qa", "none", "top 2", "random 2 seed 0", "random 2 seed 1"))
    written = {"ablate.jsonl", "ablate_summary.json", "ablate.png", "run_meta.json"}
    assert {path.name for path in (tmp_path / "o").iterdir()} == written
    code, out, _ = run(*args, "--top", "2", "--control", "none", "--tasks", "needle", "-o", str(tmp_path / "p"))
    assert code == 0
    assert "random" not in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("detect", "--mode", "best"), "heads detect: expected a mode among paper, code; got 'best'"),
        (("detect", "--needles", "none.jsonl"), "needles: expected a JSONL file; got none.jsonl"),
        (("show", "none.json"), "scores: expected a JSON file; got none.json"),
        (("show", "a", "b", "c"), "expected one or two files; got 3"),
        (("show", "Llama-2-7B-32K-Instruct", "Mistral-7B-Instruct-v0.2"), "expected two files of one model"),
        (("convert", "Llama-2-7B-32K-Instruct", "--to", "tsv", "-o", "x"), "--to: expected duo or scores; got 'tsv'"),
        (("convert", "Llama-2-7B-32K-Instruct", "--to", "scores", "-o", "x"), "expected --q-heads or --model"),
        (("train", "--mode", "best"), "heads train: expected mode among paper, code; got 'best'"),
        (("train", "--rate", "0"), "heads train: expected rate above 0; got 0.0"),
        (("ablate", "--scores", "none.json"), "scores: expected a JSON file; got none.json"),
        (("ablate", "--scores", "none.json", "--control", "all"), "--control: expected random or none; got 'all'"),
    ],
)
def test_a_mistake_is_one_line(run: Any, args: tuple[str, ...], said: str) -> None:
    code, _, err = run(*args)
    assert code == 1
    assert said in err
    assert err.count("\n") == 1


def test_scores_of_another_model_are_not_ablated(run: Any, folder: Path, tmp_path: Path) -> None:
    save_scores(HeadScores({(5, 0): (1.0,)}), tmp_path / "scores.json")
    args = ("ablate", "-m", str(folder), "--scores", str(tmp_path / "scores.json"), "-o", str(tmp_path / "o"))
    code, _, err = run(*args)
    assert code == 1
    assert "expected a head of the model (2 layers of 4 query heads); got 5-0" in err
    assert not (tmp_path / "o").exists()


def test_gates_outside_0_to_1_are_refused_and_numbers_of_heads_are_the_models(
    run: Any, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "gates.tsv").write_text("0.5\t1.2\n0.1\t0.3\n")
    args = ("convert", str(tmp_path / "gates.tsv"), "--to", "scores", "-m", str(folder), "-o", str(tmp_path / "s.json"))
    code, _, err = run(*args)
    assert code == 1
    assert "column 2: expected a gate in [0, 1]" in err
    (tmp_path / "gates.tsv").write_text("0.5\t0.2\n0.1\t0.3\n")
    assert run(*args)[0] == 0
    assert load_scores(tmp_path / "s.json").means == {
        (n, h): gate
        for n, row in enumerate([[0.5, 0.2], [0.1, 0.3]])
        for h, gate in enumerate(row for row in row for _ in "ab")
    }
