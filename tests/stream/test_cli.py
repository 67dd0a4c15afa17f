"""`hf-longctx stream` as a user types it: films, a real clip, and everything that goes wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hf_longctx.streaming.events import Event
from hf_longctx.streaming.subtitles import read
from hf_longctx.testing.vision import tiny_qwen2_5_vl

from ..operators import needs_torchvision
from .films import film

pytestmark = needs_torchvision


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model and its processor, saved as any hub folder is."""
    folder = tmp_path_factory.mktemp("tiny-vlm")
    model, processor = tiny_qwen2_5_vl()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def outputs(folder: Path) -> list[str]:
    return [f"--{form}={folder / 'out'}.{form}" for form in ("srt", "vtt", "jsonl")]


def check(folder: Path, rounds: int) -> list[Event]:
    """Three valid files that say the same."""
    lines = (folder / "out.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    events = [Event(**json.loads(line)) for line in lines]
    captions = [event for event in events if event.kind == "caption"]
    assert [(event.t, event.t_end) for event in captions] == [(n, n + 1) for n in range(rounds)]
    srt = (folder / "out.srt").read_text(encoding="utf-8")
    assert re.fullmatch(r"(\d+\n\d\d:\d\d:\d\d,\d{3} --> \d\d:\d\d:\d\d,\d{3}\n([^\n]+\n)+\n)*", srt)
    vtt = (folder / "out.vtt").read_text(encoding="utf-8")
    assert re.fullmatch(r"WEBVTT\n\n(\d\d:\d\d:\d\d\.\d{3} --> \d\d:\d\d:\d\d\.\d{3}\n([^\n]+\n)+\n)*", vtt)
    spoken = [event for event in events if re.search(r"\w", event.text)]
    assert len(read(folder / "out.vtt")) == len(read(folder / "out.srt")) >= len(spoken) > 0
    return events


def test_a_film(call: Any, vlm: str, tmp_path: Path) -> None:
    path = film(tmp_path / "greys.mkv", 25, rate=5)
    code, out, err = call("stream", str(path), "-m", vlm, "--new-tokens=4", "--ask=2.5=Who?", *outputs(tmp_path))
    assert code == 0, err
    events = check(tmp_path, 5)
    assert [(event.kind, event.t) for event in events if event.kind == "answer"] == [("answer", 3.0)]
    assert "5 s of stream, 10 frames (none lost" in out
    assert re.search(r"5 rounds: p50 \d+ ms, p99 \d+ ms", out)
    assert re.search(r"out\.jsonl: 6 captions", out)


def test_the_real_clip(call: Any, vlm: str, tmp_path: Path, bunny: Path) -> None:
    knobs = ("--max-pixels=6400", "--window-s=4", "--new-tokens=4", "--stop-s=8")
    code, _, err = call("stream", str(bunny), "-m", vlm, *knobs, *outputs(tmp_path))
    assert code == 0, err
    assert all(event.frames == 2 for event in check(tmp_path, 8))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--fps=0",), "fps: expected more than 0"),
        (("--window-s=0.2",), "expected window_s to hold a round of 1 s"),
        (("--text-sink=3",), "expected text_sink to hold the query"),
        (("--text-window=3",), "expected text_window to hold an answer"),
        (("--ask=Who?",), "--ask: expected SECONDS=QUESTION"),
        (("--when-full=burst",), "when_full: expected wait or drop"),
        (("--srt=DIR/greys.mkv",), "which exists"),
        (("--device=tpu:9",), "device: expected"),
    ],
)
def test_bad_arguments_write_nothing(call: Any, vlm: str, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    path = film(tmp_path / "greys.mkv", 5, rate=5)
    content = path.read_bytes()
    given = [word.replace("DIR", str(tmp_path)) for word in words]
    code, _, err = call("stream", str(path), "-m", vlm, f"--vtt={tmp_path / 'out.vtt'}", *given)
    assert code == 1
    assert said in err
    assert [each.name for each in tmp_path.iterdir()] == ["greys.mkv"]
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("none.mp4", "expected a video file or a folder"),
        ("camera:77", "no such device"),
        ("rtsp://127.0.0.1:9/x", "got:"),
    ],
)
def test_no_such_source(call: Any, source: str, said: str) -> None:
    code, _, err = call("stream", source, "-m", "no-model-is-looked-for")
    assert code == 1
    assert said in err


def test_no_such_model(call: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    path = film(tmp_path / "greys.mkv", 5, rate=5)
    code, _, err = call("stream", str(path), "-m", str(tmp_path / "empty"), f"--srt={tmp_path / 'a.srt'}")
    assert code == 1
    assert "model '" in err
    assert not (tmp_path / "a.srt").exists()
