"""Streams under every variant: the window equals encoding it anew, what grows grows, and the command's files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_longctx.evals import stream
from hf_longctx.evals.clip import looped, reference
from hf_longctx.evals.stream import Row, load_judge, measure, summary, tenths
from hf_longctx.evals.stream_variants import VARIANTS, Sizes
from hf_longctx.streaming.source import FrameSource, frames
from hf_longctx.streaming.subtitles import Cue
from hf_longctx.testing.vision import tiny_qwen2_5_vl

from ..operators import needs_torchvision
from ..stream.films import film
from ..stream.vlms import BY_NAME

pytestmark = needs_torchvision

SIZES = Sizes(window_s=3, text_sink=60, text_window=40, max_new_tokens=4)


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return tiny_qwen2_5_vl(num_hidden_layers=1)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("film") / "greys.mkv", 15, rate=5, size=(56, 56))


def source(video: Path, seconds: int = 10) -> FrameSource:
    return frames(looped(video, seconds), fps=2)


@pytest.fixture(scope="module")
def rows(tiny: tuple[Any, Any], video: Path) -> dict[str, list[Row]]:
    """Ten seconds under every variant; a model of one layer, whose keys know nothing of what has gone."""
    return {name: list(measure(name, make(*tiny, SIZES), source(video))) for name, make in VARIANTS.items()}


def test_the_window_says_what_encoding_it_anew_says(rows: dict[str, list[Row]]) -> None:
    window, recompute = rows["window"], rows["recompute"]
    assert [row.text for row in window] == [row.text for row in recompute]
    assert [row.tokens for row in window] == [row.tokens for row in recompute]
    assert len({row.text for row in window}) > 1
    assert [(row.t, row.t_end, row.frames) for row in window] == [(n, n + 1, 2) for n in range(10)]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_onevision", "smolvlm"])
def test_so_it_does_in_every_family(family: str, video: Path) -> None:
    model = BY_NAME[family].make(layers=1)
    sizes = replace(SIZES, window_s=1, text_sink=120, text_window=60)
    said = [
        [row.text for row in measure(name, VARIANTS[name](*model, sizes), source(video, 5))]
        for name in ("window", "recompute")
    ]
    assert said[0] == said[1]
    assert len(said[0]) == 5


def test_what_is_held(rows: dict[str, list[Row]]) -> None:
    held = {name: [row.tokens_held for row in mine] for name, mine in rows.items()}
    assert held["window"] == held["native"]
    assert max(held["window"]) <= 60 + 40 + 3 * 40  # text, and pictures of three rounds with their words
    assert len({row.bytes_held for row in rows["window"][5:]}) == 1
    assert all(a < b for a, b in zip(held["full"], held["full"][1:], strict=False))
    assert held["full"][-1] > 1.8 * held["window"][-1]


def test_positions_that_grow_are_others(rows: dict[str, list[Row]]) -> None:
    native, window = ([row.text for row in rows[name]] for name in ("native", "window"))
    assert native[:3] == window[:3]  # nothing has gone yet
    assert native != window


def test_the_model_is_given_back(tiny: tuple[Any, Any], video: Path) -> None:
    model, processor = tiny
    ids = torch.tensor([processor.tokenizer("You watch.")["input_ids"]])
    with torch.no_grad():
        before = model(ids).logits
        for name, make in VARIANTS.items():
            rounds = measure(name, make(*tiny, SIZES), source(video))
            next(rounds)
            rounds.close()
            assert torch.equal(model(ids).logits, before), name


def row(n: int, **facts: Any) -> Row:
    return replace(Row("window", n, n + 1, f"red {n}", 2, 3, 0.1, 0.05, 100, 4096), **facts)


def test_summary() -> None:
    made = [row(n, latency_s=0.1 if n < 90 else 0.3, bytes_held=min(n, 10)) for n in range(100)]
    found = summary(made, [Cue(n, n + 1, f"red {n}") for n in range(200)], lambda a, b: float(a == b), 1.0)
    assert (found["rounds"], found["stream_s"]) == (100, 100)
    assert (found["latency_p50_ms"], found["latency_p99_ms"]) == (100, 300)
    assert found["frames_per_s"] == pytest.approx(200 / (90 * 0.1 + 10 * 0.3))
    assert found["last_to_first_tenth"] == pytest.approx(3)
    assert found["bytes_constant"]
    assert (found["precision"], found["recall"], found["judged"]) == (1, 1, 1)
    assert not summary([row(n, bytes_held=n) for n in range(100)], [], None, 1.0)["bytes_constant"]
    assert "f1" not in summary(made, [], None, 1.0)
    assert tenths([3, 1, 2]) == (3, 2)


def test_judges_and_variants_are_looked_up(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    assert load_judge("operator:eq")("a", "a")
    for named in ("operator:none", "no_such_module:f", "operator", ":f"):
        with pytest.raises(ValueError, match="--judge: expected package"):
            load_judge(named)
    for names in (["windows"], [], ["full", "full"]):
        with pytest.raises(ValueError, match="variants: expected"):
            stream.run(*tiny, names, lambda: pytest.fail("opened"), SIZES, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("own", [False, True])
def test_the_command(call: Any, tiny: tuple[Any, Any], video: Path, tmp_path: Path, own: bool) -> None:
    for part in tiny:
        part.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    (tmp_path / "reference.jsonl").write_text('{"t": 0, "t_end": 2, "text": "grey"}\n')
    of_own = ["--no-loop", f"--reference={tmp_path / 'reference.jsonl'}", "--judge=operator:eq"] if own else []
    knobs = ["--seconds=4", "--window-s=2", "--new-tokens=3", "--full-s=2", f"--out={out}"]
    code, said, err = call("eval", "stream", "-m", str(tmp_path / "model"), f"--video={video}", *knobs, *of_own)
    assert code == 0, err
    found = json.loads((out / "stream_summary.json").read_text())
    assert [each["variant"] for each in found["rows"]] == ["window", "recompute", "full", "native"]
    rounds = {"window": 3 if own else 4, "recompute": 3 if own else 4, "full": 2, "native": 3 if own else 4}
    assert {each["variant"]: each["rounds"] for each in found["rows"]} == rounds
    assert all("f1" in each and (each["judged"] is not None) == own for each in found["rows"])
    assert len((out / "stream.jsonl").read_text().splitlines()) == sum(rounds.values())
    assert (out / "stream.png").stat().st_size > 10_000
    assert "recompute" in said
    assert found["meta"]["settings"]["video"] == "greys.mkv"
    code, _, err = call("eval", "stream", "-m", str(tmp_path / "model"), f"--video={video}", *knobs)
    assert code == 1
    assert "expected no former rows" in err


def test_the_reference_of_a_loop_is_what_is_drawn() -> None:
    assert [cue.text for cue in reference(2)] == ["red 0", "blue 1"]
