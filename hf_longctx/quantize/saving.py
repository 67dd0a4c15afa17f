"""What a quantization leaves on the disk: layers as they are done, and at the end a folder for `from_pretrained`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..files import replacing

WORK = ".qoq"
"""Folder, in the one that is written, of the layers that are done; gone at the end."""

_ABOUT, _REPORT = "about", "report"


def save_layer(path: Path, layer: nn.Module, report: dict[str, Any], about: dict[str, Any]) -> None:
    """Write a finished layer in one step."""
    tensors = {name: x.detach().cpu().contiguous() for name, x in layer.state_dict().items()}
    content = save(tensors, {_ABOUT: json.dumps(about), _REPORT: json.dumps(report)})
    with replacing(path) as scratch, open(scratch, "wb") as stream:
        stream.write(content)


def load_layer(path: Path, about: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and report of a layer that a former run has finished.

    Raises:
        ValueError: it was made with other settings, or is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            told = file.metadata() or {}
            former, report = json.loads(told[_ABOUT]), json.loads(told[_REPORT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: expected a finished layer; got {error!r}. Delete it to make it again.") from error
    for name, value in json.loads(json.dumps(about)).items():
        if former.get(name) != value:
            raise ValueError(
                f"--resume: expected {path} to be made with {name}={value!r}; got {former.get(name)!r}. "
                "Use the same settings, another folder, or leave out --resume."
            )
    return tensors, report


def finished(out: Path, resume: bool) -> Path:
    """The folder of finished layers.

    Raises:
        ValueError: there are some, and the run is not to go on from them; or `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"quantize: expected a folder to write; got the file {out}. Pass another --out.")
    work = out / WORK
    if work.exists() and not resume:
        raise ValueError(f"quantize: expected no unfinished run in {out}; got one. Pass --resume, or another folder.")
    work.mkdir(parents=True, exist_ok=True)
    return work


def save_model(model: Any, tokenizer: Any, out: Path, report: dict[str, Any] | None) -> None:
    """Write model, tokenizer and report beside each other; what was there stays until all of it is written.

    Raises:
        OSError: the disk is full, for one; the folder is as it was.
    """
    out.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=out, prefix=".saving-"))
    try:
        model.save_pretrained(scratch)
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        if report is not None:
            (scratch / "qoq_report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        stale = [path for path in out.glob("model*.safetensors*") if not (scratch / path.name).exists()]
        for path in sorted(scratch.iterdir()):
            os.replace(path, out / path.name)
        for path in stale:  # shards of another number would be read in place of the new ones
            path.unlink()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(out / WORK, ignore_errors=True)
