"""A fine-tune and its base to a delta, part by part, in the memory of one matrix of each.

Paper: BitDelta (arXiv:2402.10193) §3.1.
Differs: signs of every linear layer, not only of those with a name that is known; biases are kept; what is equal to the
base is left out; a scale per row or group, and more bits, are options.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...errors import UnsupportedError
from .bits import Grain, compress, fits
from .checkpoint import Checkpoint, Layout
from .digest import weight_checksum
from .experts import EXPERT
from .format import SCALES, metadata
from .message import say
from .writing import Sizes, check_folder, dense_tensors, finish, part_name

DENSE = ("16", "int8", "native")
"""How tensors are kept that are not signs: in 16 bits, tables in int8, or as the fine-tune has them."""

PART_ELEMENTS = 1 << 30
"""Weights of the fine-tune in one file, about: where a run that was interrupted goes on."""


@dataclass(frozen=True)
class Settings:
    """How a fine-tune is compressed.

    Attributes:
        planes: bits of each weight, 1 to 4.
        grain: of the scales.
        dense: one of `DENSE`.
    """

    planes: int = 1
    grain: Grain = field(default_factory=Grain)
    dense: str = "16"

    def __post_init__(self) -> None:
        if self.dense not in DENSE:
            raise ValueError(say("delta compress", f"one of {', '.join(DENSE)}", repr(self.dense), "Change --dense"))


def run(
    base: str,
    finetuned: str,
    out: Path,
    settings: Settings = Settings(),
    revision: str | None = None,
    part_elements: int = PART_ELEMENTS,
    on_tensor: Callable[[int, int], None] = lambda done, total: None,
) -> Sizes:
    """Write the delta of a fine-tune; a folder that a former run has begun is finished.

    Args:
        base: folder or hub id of the base.
        finetuned: likewise.
        out: folder, made if need be; it is a delta once it has a `config.json`.
        settings: how.
        revision: of the base on the hub.
        part_elements: weights in one file, about.
        on_tensor: told how many tensors are done, of how many.

    Raises:
        ValueError: the two are not one architecture, or the folder holds something else.
        FileNotFoundError: there are no safetensors files.
    """
    pair = _Pair.open(base, finetuned, settings, revision)
    asked = {**asdict(settings), "base": pair.base.fingerprint(), "finetuned": pair.tuned.fingerprint()}
    parts = pair.parts(part_elements)
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / part_name(number, len(parts)) for number in range(len(parts))]
    check_folder(out, paths, asked)
    done, total = 0, len(pair.tuned_keys)
    for names, path in zip(parts, paths, strict=True):
        on_tensor(done, total)
        if not path.exists():
            _write(path, pair, names, path == paths[-1], asked, partial(_tell, on_tensor, total, done))
        done += len(names)
    on_tensor(done, total)
    return finish(out, paths, pair.base, pair.tuned, pair.tuned_keys, pair.layout)


def _tell(on_tensor: Callable[[int, int], None], total: int, before: int, more: int) -> None:
    on_tensor(before + more, total)


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
        sizes, room = self.tuned.sizes(), 0
        parts: list[list[str]] = []
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
        if tuned.ndim == 3 and ".experts." in f".{name}.":
            advice = "Save the models so that each expert has its own"
            raise UnsupportedError(say(f"delta compress, {name}", "a matrix", "experts in one tensor", advice))
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
        return dense_tensors(name, tuned, self.settings.dense), known

    def rest_of_base(self) -> Iterator[tuple[str, str]]:
        """Checksums of what the base has and the fine-tune has not."""
        for name in self.base_keys.keys() - self.tuned_keys.keys():
            yield name, weight_checksum(self.base.tensor(self.base_keys[name]))


def _head_of_tied(pair: _Pair, stored: bool) -> dict[str, Tensor]:
    """A head of its own where the fine-tune's is tied to embeddings that are as in the base, and the base's is not."""
    first, last = pair.layout.ends
    untied = last in pair.base_keys and not pair.base.config.tie_word_embeddings
    if stored or not untied or not pair.layout.model.config.tie_word_embeddings:
        return {}
    return dense_tensors(last, pair.tuned.tensor(pair.tuned_keys[first]), pair.settings.dense)


def _write(
    path: Path, pair: _Pair, names: list[str], last: bool, asked: dict[str, Any], on_tensor: Callable[[int], None]
) -> None:
    """One file, in one step."""
    tensors: dict[str, Tensor] = {}
    checksums: dict[str, str] = {}
    for number, name in enumerate(names):
        on_tensor(number)
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
