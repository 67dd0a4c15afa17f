"""A fine-tune and its base to a delta, part by part, in the memory of one matrix of each.

Paper: BitDelta (arXiv:2402.10193) §3.1.
Differs: signs of every linear layer, not only of those with a name that is known; biases are kept; what is equal to the
base is left out; a scale per row or group, and more bits, are options.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .bits import Grain, compress, fits
from .checkpoint import Checkpoint, Layout
from .digest import of_model, weight_checksum
from .format import INDEX, INT8_SCALE, METHOD, ONE_FILE, SCALES, VERSION, is_delta, metadata, to_int8
from .message import say

DENSE = ("16", "int8", "native")
"""How tensors are kept that are not signs: in 16 bits, tables in int8, or as the fine-tune has them."""

PART_ELEMENTS = 1 << 30
"""Weights of the fine-tune in one file, about: where a run that was interrupted goes on."""

EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")
_BESIDE = ("generation_config.json", "chat_template.jinja", "special_tokens_map.json", "added_tokens.json")
_BESIDE_STARTS = ("tokenizer", "vocab", "merges", "spiece", "preprocessor", "processor")


@dataclass(frozen=True)
class Settings:
    """How a fine-tune is compressed.

    Attributes:
        planes: bits of each weight, 1 to 4.
        grain: of the scales.
        dense: one of `DENSE`.
    """

    planes: int = 1
    grain: Grain = Grain()
    dense: str = "16"

    def __post_init__(self) -> None:
        if self.dense not in DENSE:
            raise ValueError(say("delta compress", f"one of {', '.join(DENSE)}", repr(self.dense), "Change --dense"))


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


def run(
    base: str,
    finetuned: str,
    out: Path,
    settings: Settings = Settings(),  # noqa: B008 - it is frozen
    revision: str | None = None,
    part_elements: int = PART_ELEMENTS,
    on_part: Callable[[int, int], None] = lambda done, total: None,
) -> Sizes:
    """Write the delta of a fine-tune; a folder that a former run has begun is finished.

    Args:
        base: folder or hub id of the base.
        finetuned: likewise.
        out: folder, made if need be; it is a delta once it has a `config.json`.
        settings: how.
        revision: of the base on the hub.
        part_elements: weights in one file, about.
        on_part: told how many parts are done, of how many.

    Raises:
        ValueError: the two are not one architecture, or the folder holds something else.
        FileNotFoundError: there are no safetensors files.
    """
    pair = _Pair.open(base, finetuned, settings, revision)
    asked = {**asdict(settings), "base": pair.base.fingerprint(), "finetuned": pair.tuned.fingerprint()}
    parts = pair.parts(part_elements)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / _part_name(number, len(parts)) for number in range(len(parts))]
    _check_folder(out, paths, asked)
    on_part(0, len(parts))
    for number, (names, path) in enumerate(zip(parts, paths, strict=True)):
        if not path.exists():
            _write(path, pair, names, number == len(parts) - 1, asked)
        on_part(number + 1, len(parts))
    return _finish(out, pair, paths)


@dataclass(frozen=True)
class _Pair:
    """Both checkpoints, and the names that the model has for their tensors."""

    base: Checkpoint
    tuned: Checkpoint
    layout: Layout
    settings: Settings
    base_keys: dict[str, str]
    tuned_keys: dict[str, str]

    @staticmethod
    def open(base: str, finetuned: str, settings: Settings, revision: str | None) -> _Pair:
        """Open both, and refuse what is no pair."""
        below, above = Checkpoint.open(base, revision), Checkpoint.open(finetuned)
        for which in (below, above):
            about = getattr(which.config, "quantization_config", None)
            if about is not None:
                method = about.get("quant_method") if isinstance(about, dict) else about.quant_method
                advice = "Compress from checkpoints in 16 or 32 bits; the delta then goes with a quantized base, too"
                raise ValueError(say(which.name, "weights that are not quantized", method, advice))
        one, other = below.config.model_type, above.config.model_type
        if one != other:
            raise ValueError(say("delta compress", f"a fine-tune of the base's type '{one}'", other, "Check --base"))
        layout = Layout.of(above.config)
        names = [{layout.name(key): key for key in which.files} for which in (below, above)]
        if layout.model.config.tie_word_embeddings:
            names[1].pop(layout.ends[1], None)
        return _Pair(below, above, layout, settings, *names)

    def parts(self, elements: int) -> list[list[str]]:
        """Names of the fine-tune's tensors, by file."""
        sizes, parts, room = self.tuned.sizes(), [], 0
        for name, key in self.tuned_keys.items():
            if room <= 0:
                parts.append([])
                room = elements
            parts[-1].append(name)
            room -= sizes[key]
        return parts

    def weight_of_base(self, name: str) -> Tensor | None:
        """The base's own tensor, or the embeddings where its head is tied to them; None: it has none."""
        first, last = self.layout.ends
        if name == last and name not in self.base_keys:
            name = first
        key = self.base_keys.get(name)
        return None if key is None else self.base.tensor(key)

    def packs(self, name: str, weight: Tensor) -> bool:
        """True for a matrix that is stored as signs."""
        known = name in self.layout.packed or EXPERT.fullmatch(name) is not None
        stored = weight.T if self.layout.packed.get(name) else weight
        return known and weight.ndim == 2 and fits(stored, self.settings.grain)

    def encode(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors of one weight as the file has them, and the base's checksum."""
        tuned, base = self.tuned.tensor(self.tuned_keys[name]), self.weight_of_base(name)
        known = {} if base is None or name not in self.base_keys else {name: weight_checksum(base)}
        if base is not None and base.shape == tuned.shape:
            if torch.equal(base, tuned):
                return {}, known
            if self.packs(name, tuned):
                difference = tuned.float().sub_(base)
                del tuned, base
                if self.layout.packed.get(name):
                    difference = difference.T.contiguous()
                matrix = compress(difference, self.settings.planes, self.settings.grain)
                return {name: matrix.bits, name + SCALES: matrix.scales}, known
        elif base is None or base.shape[1:] != tuned.shape[1:] or name not in self.layout.ends:
            got = f"{None if base is None else tuple(base.shape)} and {tuple(tuned.shape)}"
            advice = "Only the vocabulary may grow. Is this the base of the fine-tune?"
            raise ValueError(say(f"delta compress, {name}", "the same shape in base and fine-tune", got, advice))
        return _dense(name, tuned, self.settings.dense), known

    def rest_of_base(self) -> Iterator[tuple[str, str]]:
        """Checksums of what the base has and the fine-tune has not."""
        for name in self.base_keys.keys() - self.tuned_keys.keys():
            yield name, weight_checksum(self.base.tensor(self.base_keys[name]))


def _dense(name: str, tuned: Tensor, how: str) -> dict[str, Tensor]:
    """A tensor of the fine-tune itself."""
    if how == "int8" and tuned.ndim == 2:
        values, scale = to_int8(tuned)
        return {name: values, name + INT8_SCALE: scale}
    return {name: tuned.bfloat16() if how != "native" and tuned.dtype.itemsize > 2 else tuned}


def _head_of_tied(pair: _Pair, stored: bool) -> dict[str, Tensor]:
    """A head of its own where the fine-tune's is tied to embeddings that are as in the base, and the base's is not."""
    first, last = pair.layout.ends
    untied = last in pair.base_keys and not pair.base.config.tie_word_embeddings
    if stored or not untied or not pair.layout.model.config.tie_word_embeddings:
        return {}
    return _dense(last, pair.tuned.tensor(pair.tuned_keys[first]), pair.settings.dense)


def _write(path: Path, pair: _Pair, names: list[str], last: bool, asked: dict[str, Any]) -> None:
    """One file, in one step."""
    tensors: dict[str, Tensor] = {}
    checksums: dict[str, str] = {}
    for name in names:
        encoded, known = pair.encode(name)
        if name == pair.layout.ends[0]:
            encoded |= _head_of_tied(pair, bool(encoded))
        tensors |= encoded
        checksums |= known
    if last:
        checksums |= dict(pair.rest_of_base())
    about = {**metadata(tensors, checksums), "asked": json.dumps(asked, sort_keys=True)}
    scratch = path.with_suffix(".partial")
    save_file(tensors, scratch, about)
    os.replace(scratch, path)


def _part_name(number: int, parts: int) -> str:
    return ONE_FILE if parts == 1 else f"model-{number + 1:05d}-of-{parts:05d}.safetensors"


def _check_folder(out: Path, paths: list[Path], asked: dict[str, Any]) -> None:
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


def _finish(out: Path, pair: _Pair, paths: list[Path]) -> Sizes:
    """Index, tokenizer and `config.json`, the last of all; and what it all takes."""
    checksums: dict[str, str] = {}
    places: dict[str, str] = {}
    sizes = Sizes(weights=sum(pair.tuned.sizes()[key] for key in pair.tuned_keys.values()))
    for path in paths:
        with safe_open(path, "pt") as file:
            checksums |= json.loads(file.metadata()["base"])
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                places[name] = path.name
                sizes.add(_kind(name, pair.layout, set(file.keys())), file.get_tensor(name).nbytes)
    stored, known = places.keys(), pair.tuned.sizes()
    sizes.shared = 2 * sum(known[key] for name, key in pair.tuned_keys.items() if name not in stored)
    if len(paths) > 1:
        about = {"metadata": {"total_size": sizes.nbytes}, "weight_map": places}
        (out / INDEX).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for path in sorted(pair.tuned.folder.iterdir()):
        if path.is_file() and (path.name in _BESIDE or path.name.startswith(_BESIDE_STARTS)):
            shutil.copyfile(path, out / path.name)
    write_config(out, json.loads((pair.tuned.folder / "config.json").read_text()), pair.base, checksums)
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
    assert is_delta({"quantization_config": about})
    scratch = out / "config.partial"
    scratch.write_text(json.dumps({**config, "quantization_config": about}, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, out / "config.json")


def _kind(name: str, layout: Layout, stored: set[str]) -> str:
    """What a stored tensor is, for the report."""
    if name.endswith(SCALES) and name.removesuffix(SCALES) in stored:
        return "scales"
    weight = name.removesuffix(INT8_SCALE)
    if name + SCALES in stored:
        return "signs"
    return layout.kinds.get(weight if weight in stored else name, "others")
