"""`hf-longctx delta ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_longctx.weights.bitdelta.format import read

from .test_published import publish


def test_compress_says_what_it_takes(call: Any, llama_pairs: dict[str, Any], tmp_path: Path) -> None:
    pair = llama_pairs["law"]
    wanted = ("--base", str(pair.base_folder), "--finetuned", str(pair.tuned_folder), "-o", str(tmp_path / "out"))
    code, out, err = call("delta", "compress", *wanted, "--dense", "native")
    assert code == 0, err
    assert f"{pair.sizes.parts['signs']:,}" in out
    assert f"{pair.sizes.ratio:.1f} times smaller" in out
    tensors, others = read(tmp_path / "out").tensors(), read(pair.folder).tensors()
    assert tensors.keys() == others.keys()
    assert all(torch.equal(x, others[name]) for name, x in tensors.items())
    code, _, err = call("delta", "compress", *wanted)
    assert code == 1
    assert "Use another folder" in err


def test_convert(call: Any, llama_pairs: dict[str, Any], tmp_path: Path) -> None:
    pair = llama_pairs["law"]
    torch.save(publish(pair), tmp_path / "diff.pt")
    wanted = (str(tmp_path / "diff.pt"), "--base", str(pair.base_folder), "-o", str(tmp_path / "out"))
    code, _, err = call("delta", "convert", *wanted)
    assert code == 0, err
    assert read(tmp_path / "out").matrices.keys() == read(pair.folder).matrices.keys()
    code, _, err = call("delta", "convert", *wanted)
    assert code == 1
    assert "an empty folder" in err
