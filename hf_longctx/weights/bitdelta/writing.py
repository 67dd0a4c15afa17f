"""The folder of a delta as it comes to be: its parts, then what names them, and what it all takes."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint import Checkpoint, Layout
from .digest import of_model
from .format import INDEX, INT8_SCALE, METHOD, ONE_FILE, SCALES, VERSION, Delta, files_of, metadata, to_int8
from .message import say

_BESIDE = ("generation_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json")
_BESIDE_STARTS = ("tokenizer", "vocab", "merges", "spiece", "preprocessor", "processor")


@dataclass
class Sizes:
    """What a delta takes.

    Attributes:
        parts: bytes by kind: signs, scales, embeddings, head, norms, biases, others.
        shared: bytes, at 16 bits a weight, that are not stored as they are in the base.
        weights: of the fine-tune, all of them.
    """

    parts: dict[str, int] = field(default_factory=dict)
    shared: int = 0
    weights: int = 0

    @property
    def nbytes(self) -> int:
        return sum(self.parts.values())

    @property
    def ratio(self) -> float:
        """Bytes of the fine-tune at 16 bits a weight, over those of all of the delta."""
        return 2 * self.weights / max(1, self.nbytes)

    def add(self, kind: str, nbytes: int) -> None:
        self.parts[kind] = self.parts.get(kind, 0) + nbytes


def dense_tensors(name: str, tuned: Tensor, how: str) -> dict[str, Tensor]:
    """A tensor of the fine-tune itself."""
    if how == "int8" and tuned.ndim == 2:
        values, scale = to_int8(tuned)
        return {name: values, name + INT8_SCALE: scale}
    return {name: tuned.bfloat16() if how != "native" and tuned.dtype.itemsize > 2 else tuned}


def part_name(number: int, parts: int) -> str:
    return ONE_FILE if parts == 1 else f"model-{number + 1:05d}-of-{parts:05d}.safetensors"


def check_folder(out: Path, paths: list[Path], asked: dict[str, Any]) -> None:
    """Refuse a folder with something else in it; what a former run of the same has finished may stay."""
    config = out / "config.json"
    others = {*out.glob("*.safetensors")} - {*paths}
    if config.exists() or others:
        found = "config.json" if config.exists() else sorted(others)[0].name
        raise ValueError(say("delta compress", f"nothing else in {out}", found, "Use another folder"))
    for path in paths:
        if path.exists():
            former = None
            with suppress(SafetensorError), safe_open(path, "pt") as file:
                former = (file.metadata() or {}).get("asked")
            if former != json.dumps(asked, sort_keys=True):
                advice = "Delete the file, or use another folder"
                raise ValueError(say(str(path), "a part of this run", "one of other settings or models", advice))


def finish(
    out: Path, paths: list[Path], base: Checkpoint, tuned: Checkpoint, keys: dict[str, str], layout: Layout
) -> Sizes:
    """Index, tokenizer and `config.json`, the last of all; and what it all takes."""
    checksums: dict[str, str] = {}
    places: dict[str, str] = {}
    sizes = Sizes(weights=sum(tuned.sizes()[key] for key in keys.values()))
    for path in paths:
        with safe_open(path, "pt") as file:
            checksums |= json.loads(file.metadata()["base"])
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                places[name] = path.name
                sizes.add(_kind(name, layout, set(file.keys())), file.get_tensor(name).nbytes)
    stored, known = places.keys(), tuned.sizes()
    sizes.shared = 2 * sum(known[key] for name, key in keys.items() if name not in stored)
    if len(paths) > 1:
        about = {"metadata": {"total_size": sizes.nbytes}, "weight_map": places}
        (out / INDEX).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for path in sorted(tuned.folder.iterdir()):
        if path.is_file() and (path.name in _BESIDE or path.name.startswith(_BESIDE_STARTS)):
            shutil.copyfile(path, out / path.name)
    write_config(out, json.loads((tuned.folder / "config.json").read_text()), base, checksums)
    return sizes


def write_config(out: Path, config: dict[str, Any], base: Checkpoint, checksums: dict[str, str]) -> None:
    """The fine-tune's `config.json`, with where its base is; in one step, as this makes the folder a delta."""
    named = base.name if base.revision else os.path.relpath(base.folder.resolve(), out.resolve())
    about = {
        "quant_method": METHOD,
        "version": VERSION,
        "base": named,
        "revision": base.revision,
        "base_digest": of_model(checksums),
    }
    scratch = out / "config.partial"
    scratch.write_text(json.dumps({**config, "quantization_config": about}, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, out / "config.json")


def update(folder: Path, delta: Delta) -> None:
    """Write a delta over the one that it was made from, file by file; a failure leaves each file old or new.

    Args:
        folder: of the delta before.
        delta: its tensors may have other values, and there may be more of them.
    """
    tensors, paths = delta.tensors(), files_of(folder)
    places: dict[str, str] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            about, names = file.metadata(), set(file.keys())
        gone = {name for name in names if name not in tensors}  # scales of tables that are now in 16 bits
        here = {name: tensors.pop(name) for name in names - gone}
        if path == paths[-1]:
            here |= tensors
        fresh = metadata(here, json.loads(about["base"]))
        scratch = path.with_suffix(".partial")
        save_file({name: x.contiguous() for name, x in here.items()}, scratch, {**about, **fresh})
        os.replace(scratch, path)
        places |= dict.fromkeys(here, path.name)
    if len(paths) > 1:
        about = {"metadata": {"total_size": delta.nbytes}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _kind(name: str, layout: Layout, stored: set[str]) -> str:
    """What a stored tensor is, for the report."""
    if name.endswith(SCALES) and name.removesuffix(SCALES) in stored:
        return "scales"
    weight = name.removesuffix(INT8_SCALE)
    if name + SCALES in stored:
        return "signs"
    return layout.kinds.get(weight if weight in stored else name, "others")
