from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hf_longctx
from hf_longctx import cli
from hf_longctx.kernels.dispatch import LACKS


@pytest.fixture
def run(call):
    return call


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ((), ("doctor", "demo", "eval", "bench", "plan")),
        (("plan",), ("--context", "--batch", "--memory", "--json", "config.json")),
        (("bench",), ("model", "op")),
        (("bench", "model"), ("--methods", "--lengths", "--peers", "--random", "--resume", "kvpress:snapkv")),
        (("bench", "op"), ("--lengths", "--bits", "attend_chosen", "antidiagonal")),
        (("doctor",), ("--json",)),
        (("demo",), ("--length", "--sparsity", "SmolLM2-135M-Instruct")),
        (("eval",), ("ppl", "needle", "passkey", "ruler", "stream")),
        (("eval", "stream"), ("--variants", "--reference", "--judge")),
        (("stream",), ("--fps", "--window-s", "--query", "--srt", "--vtt", "--jsonl", "--ask")),
        (("eval", "needle"), ("--depths", "--no-dense", "--resume", "--batch")),
        (("eval", "ppl"), ("--dense-tokens", "--resume")),
        (("tune",), ("crossover", "xattention")),
        (("tune", "crossover"), ("--lengths", "--budget", "--out")),
        (("tune", "xattention"), ("--stride", "--coverage", "--steps")),
    ],
)
def test_help_names_the_options(run, command: tuple[str, ...], words: tuple[str, ...]) -> None:
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert [word for word in words if word not in out] == []


def test_version(run) -> None:
    assert run("--version") == (0, f"hf_longctx {hf_longctx.__version__}\n", "")


def test_doctor_prints_the_reason_of_every_no(run) -> None:
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["devices"][0]["memory_bytes"] > 0
    assert {row["op"] for row in found["operations"] if row["available"]} == {row["op"] for row in found["operations"]}
    assert all(row["reason"] for row in found["operations"] if not row["available"])
    code, out, _ = run("doctor")
    assert code == 0
    said = " ".join(out.split())
    known = [row for row in found["operations"] if not row["available"] and not row["reason"].endswith(LACKS)]
    assert all(" ".join(row["reason"].split()) in said for row in known)
    lines = {line.split()[1]: line for line in out.splitlines() if line.startswith("│")}
    for row in found["operations"]:
        assert (row["backend"] in lines[row["op"]]) == row["available"], row


def test_demo_runs_every_method_that_the_model_supports_and_says_which_it_leaves_out(run, folder: Path) -> None:
    code, out, err = run("demo", "-m", str(folder), "--length", "400", "--window", "60", "--new-tokens", "3")
    assert code == 0, err
    table = {line.split()[0]: line for line in out.splitlines() if "MiB" in line}
    assert set(table) == {"dense", "streaming_llm", "quest"}
    assert "duo_attention is left out" in out
    held = {name: float(line.split(" MiB")[0].split()[-1]) for name, line in table.items()}
    assert held["streaming_llm"] < held["dense"]


def test_demo_takes_a_pattern(run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text("0.1\t0.9\n0.8\t0.2\n")
    args = ("--methods", "duo_attention", "--pattern", str(tmp_path), "--length", "300", "--new-tokens", "2")
    code, out, err = run("demo", "-m", str(folder), *args)
    assert code == 0, err
    assert "MiB" in out


def test_eval_ppl_writes_numbers_and_a_plot(run, folder: Path, tmp_path: Path) -> None:
    sizes = ("--tokens", "300", "--window", "60", "--chunk", "32", "--block", "96", "--dense-tokens", "200")
    code, out, err = run("eval", "ppl", "-m", str(folder), *sizes, "-o", str(tmp_path / "o"))
    assert code == 0, err
    stored = json.loads((tmp_path / "o" / "ppl.json").read_text())
    last = {row["method"]: row["stop"] for row in stored["rows"]}
    assert last == {"dense": 200, "window": 300, "streaming_llm": 300}
    assert stored["meta"]["settings"]["model"] == folder.name
    assert str(folder.parent) not in json.dumps(stored)
    assert (tmp_path / "o" / "ppl.png").stat().st_size > 5_000
    assert "KV held at the end" in out


@pytest.mark.parametrize(
    ("name", "sizes", "rows"),
    [
        ("needle", ("--lengths", "280,300", "--depths", "2", "--new-tokens", "2"), 8),
        ("passkey", ("--lengths", "300", "--trials", "3", "--batch", "3", "--new-tokens", "2"), 6),
        ("ruler", ("--lengths", "900", "--tasks", "niah_single,fwe", "--samples", "1", "--chunk", "64"), 4),
    ],
)
def test_eval_writes_rows_means_and_what_it_takes_to_run_it_again(
    run, folder: Path, tmp_path: Path, name: str, sizes: tuple[str, ...], rows: int
) -> None:
    args = ("eval", name, "-m", str(folder), "--methods", "streaming_llm(window=60)", *sizes, "-o", str(tmp_path))
    code, out, err = run(*args)
    assert code == 0, err
    lines = (tmp_path / f"{name}.jsonl").read_text().splitlines()
    assert len(lines) == rows
    assert {json.loads(line)["method"] for line in lines} == {"dense", "streaming_llm(window=60)"}
    assert json.loads((tmp_path / f"{name}_summary.json").read_text())[-1]["dense_kv_bytes"] > 0
    assert str(folder.parent) not in (tmp_path / "run_meta.json").read_text()
    assert (tmp_path / "needle.png").exists() == (name == "needle")
    assert "KV held" in out
    code, out, err = run(*args)
    assert code == 1
    assert "Pass --resume" in err
    code, out, err = run(*args, "--resume")
    assert code == 0, err
    assert (tmp_path / f"{name}.jsonl").read_text().splitlines() == lines


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("demo", "--methods", "streming_llm"), "Did you mean 'streaming_llm'?"),
        (("demo", "--sinks", "-1", "--methods", "streaming_llm"), "-1"),
        (("demo", "--length", "20"), "length of at least"),
        (("demo", "--depth", "2"), "depth from 0 to 1"),
        (("demo", "--text", "nowhere.txt"), "nowhere.txt, which does not exist"),
        (("demo", "--methods", "duo_attention", "--pattern", "Nonesuch"), "Nonesuch"),
        (("eval", "ppl", "--tokens", "10000000"), "Pass a longer text or fewer tokens"),
        (("eval", "ppl", "--block", "100"), "multiple of the chunk"),
        (("eval", "ppl", "--device", "cuda:77"), "cuda:77"),
        (("eval", "needle", "--lengths", "1g"), "tokens such as 1k,2k,4096; got '1g'"),
        (("eval", "needle", "--methods", "streaming_llm(windw=4)"), "Did you mean 'window'?"),
        (("eval", "needle", "--methods", "dense,duo_attention", "--lengths", "300"), "duo_attention: expected"),
        (("eval", "needle", "--depths", "0"), "depths: expected at least 1"),
        (("eval", "passkey", "--trials", "0"), "at least 1 trial"),
        (("eval", "passkey", "--batch", "0"), "batch: expected at least 1"),
        (("eval", "ruler", "--tasks", "vt,qa_1"), "Question answering"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_1(
    run, folder: Path, tmp_path: Path, args: tuple[str, ...], said: str
) -> None:
    where = ("-m", str(folder), *(("-o", str(tmp_path)) if args[0] == "eval" else ()))
    code, _, err = run(*args, *where)
    assert code == 1
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("ruler", "--tasks", "vt,qa_1"), "ruler: expected tasks among"),
        (("ruler", "--tasks", "vt,vt"), "each once; got 'vt'"),
        (("ruler", "--tasks", ","), "at least 1 task and 1 sample; got 0 and 10"),
        (("ruler", "--samples", "0"), "at least 1 task and 1 sample; got 7 and 0"),
        *(
            ((name, "--methods", "dense,qest"), "Did you mean 'quest'?")
            for name in ("needle", "passkey", "ruler", "ppl")
        ),
        *(((name, "--lengths", "1k,4q"), "such as 1k,2k,4096; got '4q'") for name in ("needle", "passkey", "ruler")),
        (("needle", "--new-tokens", "1"), "needle: expected at least 1 trial and 2 new tokens; got 1 and 1"),
        (("passkey", "--trials", "0"), "passkey: expected at least 1 trial and 2 new tokens; got 0 and 12"),
        (("ppl", "--block", "100"), "multiple of the chunk; got block 100 and chunk 512"),
        (("ppl", "--tokens", "1"), "ppl: expected at least 2 tokens; got 1"),
        (("ppl", "--dense-tokens", "0"), "ppl: expected at least 2 tokens; got 0"),
        (("ppl", "--window", "-1"), "expected window"),
    ],
)
def test_a_mistake_is_refused_before_the_model_is_looked_for(run, args: tuple[str, ...], said: str) -> None:
    code, _, err = run("eval", *args, "-m", "./no-such-folder")
    assert code == 1
    assert "no-such-folder" not in err
    assert said in err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_LONGCTX_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["hf-longctx", "demo", "--text", "nowhere.txt"])
    with pytest.raises(FileNotFoundError):
        cli.main()


def test_a_wrong_option_is_exit_code_2(run) -> None:
    code, _, err = run("demo", "--lenght", "3")
    assert code == 2
    assert "--length" in err


def test_the_command_as_a_process_prints_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hf_longctx", "demo", "-m", "./no-such-folder"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 1
    assert "no-such-folder" in done.stderr
    assert "Traceback" not in done.stderr
