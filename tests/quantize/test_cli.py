"""The command `hf-longctx quantize`, from a folder to one that loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_longctx.weights.qoq.linear import QoQLinear

FEW = ("--samples", "3", "--seqlen", "32", "--group-size", "32", "--device", "cpu")


def test_help_names_the_options(call: Any) -> None:
    code, out, _ = call("quantize", "--help")
    assert code == 0
    words = (
        "--group-size",
        "--calib",
        "--samples",
        "--smooth-attention",
        "--rotate",
        "--gptq",
        "--resume",
        "--nearest",
    )
    assert [word for word in words if word not in out] == []


@pytest.mark.parametrize("more", [(), ("--nearest",), ("--wbits", "8", "--no-rotate", "--no-gptq", "--smooth", "-1")])
def test_a_folder_becomes_one_that_loads(call: Any, folder: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    few = FEW if "--wbits" not in more else (*FEW[:4], *FEW[6:])
    code, out, err = call("quantize", str(folder), "-o", str(tmp_path), *few, *more)
    assert code == 0, err
    assert f"Model: {tmp_path}" in out
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(model.model.layers[0].mlp.down_proj, QoQLinear)
    ids = AutoTokenizer.from_pretrained(tmp_path)("one two", return_tensors="pt").input_ids
    with torch.no_grad():
        assert model(ids).logits.isfinite().all()
    assert (tmp_path / "qoq_report.json").exists() is ("--nearest" not in more)
    if "--nearest" not in more:
        assert "to the nearest" in out
        report = json.loads((tmp_path / "qoq_report.json").read_text())
        assert len(report["layers"]) == len(model.model.layers)
        assert report["meta"]["settings"]["samples"] == 3


def test_a_mistake_is_one_line(call: Any, folder: Path, tmp_path: Path) -> None:
    code, _, err = call(
        "quantize", str(folder), "-o", str(tmp_path / "out"), "--group-size", "32", "--samples", "9999999"
    )
    assert code == 1
    assert "Pass a longer --calib" in err
    assert not (tmp_path / "out").exists()
    code, _, err = call("quantize", str(folder), "--group-size", "100")
    assert (code, "got 100" in err) == (1, True)
