from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from hf_longctx.evals import needle, team
from hf_longctx.evals.runner import Options, Row
from hf_longctx.evals.team import Team

from . import world

METHODS = "streaming_llm(sinks=2,window=60)"
TIMES = ("prefill_s", "token_ms", "dense_prefill_s", "dense_token_ms")


def timeless(rows: list[Row]) -> list[Row]:
    """Rows without what the clock said."""
    assert set(TIMES) <= {field.name for field in fields(Row)}
    return [replace(row, **dict.fromkeys(TIMES, 0.0)) for row in rows]


def launch(folder: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The command of the documentation, in two processes."""
    asked = ["--methods", METHODS, "--lengths", "280,300,320", "--depths", "2", "--new-tokens", "3", "--batch", "1"]
    where = ["-m", str(folder), "--device", "cpu", "--dtype", "float32", "--chunk", "64", "--out", str(out)]
    start = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    port = ["--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", "-m", "hf_longctx"]
    command = [*start, *port, "eval", "needle", *where, *asked, *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(world.ROOT)}
    return subprocess.run(command, cwd=world.ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_two_processes_share_the_trials_and_go_on_after_an_interruption(
    tiny: tuple[Any, Any], folder: Path, tmp_path: Path
) -> None:
    whole = needle.run(*tiny, METHODS, [280, 300, 320], [0.0, 1.0], new_tokens=3, options=Options(chunk=64))
    # as it is when process 1 was stopped after its first row, and process 0 while it wrote its second
    first = needle.run(
        *tiny, METHODS, [280], [0.0, 1.0], new_tokens=3, options=Options(out=tmp_path, chunk=64, baseline=True)
    )
    path = tmp_path / "needle.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.unlink()
    (tmp_path / "needle.part-0.jsonl").write_bytes(lines[0] + lines[2][:30])
    (tmp_path / "needle.part-1.jsonl").write_bytes(lines[1])
    with pytest.raises(ValueError, match=r"needle: expected no former rows in .*part-0\.jsonl; got some"):
        needle.run(*tiny, METHODS, [280], [0.0, 1.0], new_tokens=3, options=Options(out=tmp_path, chunk=64))
    done = launch(folder, tmp_path, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [Row(**json.loads(line)) for line in path.read_bytes().splitlines()]
    assert timeless(rows) == timeless(whole)
    assert rows[:2] == first[:2]  # times included: they did not run again
    assert not list(tmp_path.glob("*.part-*"))
    assert done.stdout.count("Needles found") == 1
    summary = json.loads((tmp_path / "needle_summary.json").read_text())
    assert [(each["method"], each["trials"]) for each in summary] == [("dense", 2)] * 3 + [(METHODS, 2)] * 3
    assert (tmp_path / "needle.png").exists()


def test_shares_are_whole_and_apart() -> None:
    parts = list(range(7))
    shares = [Team(index, 3).share(parts) for index in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    assert Team().share(parts) == parts


def test_a_single_process_takes_up_what_several_left(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    options = Options(out=tmp_path, chunk=64, resume=True)
    whole = needle.run(*tiny, METHODS, [280], [0.0, 1.0], new_tokens=3, options=options)
    path = tmp_path / "needle.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0])
    (tmp_path / "needle.part-0.jsonl").write_bytes(lines[0] + lines[2])  # stopped after it was merged
    (tmp_path / "needle.part-1.jsonl").write_bytes(lines[1])
    again = needle.run(*tiny, METHODS, [280], [0.0, 1.0], new_tokens=3, options=options)
    assert again[:3] == whole[:3]
    assert len(path.read_bytes().splitlines()) == 4
    assert not list(tmp_path.glob("*.part-*"))


def test_one_text_is_refused_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Two:
        num_processes, process_index = 2, 0

    monkeypatch.setattr(team, "PartialState", Two)
    with pytest.raises(NotImplementedError, match=r"eval ppl: expected one process.*got 2"):
        team.alone("eval ppl")
    with pytest.raises(NotImplementedError, match="needle: expected a whole model in each of 2 processes"):
        team.team_of(type("Split", (), {"_tp_size": 2})(), "needle")
    assert team.team_of(object(), "needle") == Team(0, 2)
