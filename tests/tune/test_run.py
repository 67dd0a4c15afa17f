"""`hf-longctx tune xattention` from the command line to the plan that uses its file."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

import hf_longctx as lc
from hf_longctx.models import inspect_model
from hf_longctx.tune import run
from hf_longctx.tune.thresholds import load_thresholds

from ..integration.cases import BY_NAME

SIZES = ("--block", "16", "--stride", "8", "--length", "64", "--samples", "2")


@pytest.fixture
def tune(folder: Path, call: Any) -> Any:
    return partial(call, "tune", "xattention", "-m", str(folder))


@pytest.mark.parametrize("method", ["dp", "heuristic"])
def test_the_file_fits_the_model_and_the_method(tune: Any, folder: Path, tmp_path: Path, method: str) -> None:
    path = tmp_path / "new" / "taus.json"
    code, out, err = tune(*SIZES, "--method", method, "--coverage", "0.8", "-o", str(path))
    assert code == 0, err
    rows = {line.split("│")[1].strip(): line for line in out.splitlines() if "%" in line}
    assert set(rows) - {f"{method} (saved)"} == {"0.9 for all", "heuristic" if method == "dp" else "dp"}
    found = load_thresholds(path)
    assert (found.model, found.family, found.stride, found.block) == (folder.name, "llama", 8, 16)
    assert f"{found.meta['covered']:.2%}" in rows[f"{method} (saved)"]
    assert method == "heuristic" or found.meta["covered"] >= 0.8
    assert found.meta["settings"]["samples"] == 2
    assert str(folder.parent) not in path.read_text()
    facts = inspect_model(AutoModelForCausalLM.from_pretrained(folder))
    plan = lc.XAttention(stride=8, block=16, tau=path).plan(facts)
    assert [layer.groups[0].policy.prefill.budget.shares for layer in plan.layers] == list(found.tau)


def test_layers_with_their_own_window_read_everything(tmp_path: Path) -> None:
    case = BY_NAME["gemma2"]
    settings = run.Settings("gemma2", "dp", 8, 16, 64, 1, 0.8, 100, "random", "")
    found = run.run(case.make(), list(case.prompt(64)), settings, tmp_path / "taus.json", Console(file=sys.stderr))
    assert found == load_thresholds(tmp_path / "taus.json")
    assert found.tau[0] == (1.0,) * 4
    assert min(found.tau[1]) < 1
    windows = BY_NAME["mistral_sliding"].make()
    with pytest.raises(lc.UnsupportedError, match="tune xattention: expected a layer with full attention"):
        run.run(windows, [torch.zeros(64, dtype=torch.int64)], settings, tmp_path / "no.json", Console(file=sys.stderr))
    assert not (tmp_path / "no.json").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--method", "best"), "expected method among dp, heuristic; got 'best'"),
        (("--stride", "7"), "expected stride that divides the block of 128; got 7"),
        (("--block", "0"), "expected block >= 1; got 0"),
        (("--length", "100"), "expected length in whole blocks, at least 3; got 100"),
        (("--length", "4kb"), "expected tokens such as 1k,2k,4096; got '4kb'"),
        (("--samples", "0"), "expected samples >= 1"),
        (("--samples", "1000"), "--text: expected at least"),
        (("--coverage", "1.5"), "expected coverage in (0, 1]; got 1.5"),
        (("--steps", "0"), "expected steps >= 1"),
        (("--text", "nowhere.txt"), "nowhere.txt, which does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_the_old_file(
    tune: Any, tmp_path: Path, args: tuple[str, ...], said: str
) -> None:
    path = tmp_path / "taus.json"
    path.write_text(json.dumps("old"))
    code, _, err = tune(*args, "-o", str(path))
    assert code == 1
    assert err.startswith("error: ")
    assert said in err
    assert json.loads(path.read_text()) == "old"
