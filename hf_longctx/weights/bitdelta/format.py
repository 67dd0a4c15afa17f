"""The files of a delta: safetensors and a `config.json` that names its base. Read as a whole or not at all.

`<module>.weight` is int32 `[P, N, K / 32]` and `<module>.weight_scales` float32 `[P, 1 or N, groups]`. Any other name
is a tensor of the fine-tune itself, in 16 bits, or in int8 with `<name>_scale`, float32 `[rows, 1]`. What is not there
is as in the base. The packed tensor has the name of the weight on purpose: where this package is not imported,
transformers finds a shape that does not fit and stops, in place of starting from random numbers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .bits import WORD, Matrix
from .digest import checksum, of_model
from .message import say

METHOD = "bitdelta"
VERSION = 1
SCALES = "_scales"
INT8_SCALE = "_scale"
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_AGAIN = "Compress the fine-tune again, or fetch the files again"


@dataclass(frozen=True)
class Base:
    """What a delta is a difference from.

    Attributes:
        name: hub id, or a folder, relative to that of the delta.
        revision: commit on the hub, or None.
        digest: of all its tensors.
        checksums: of each, by its name; empty where a file does not know them.
    """

    name: str | None = None
    revision: str | None = None
    digest: str | None = None
    checksums: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Delta:
    """A fine-tune beside its base, in host memory.

    Attributes:
        source: folder or file, for messages.
        base: what it is a difference from.
        matrices: by the name of the weight.
        dense: tensors of the fine-tune itself, by name, in the type in which they are stored.
        int8: scales of those that are in int8.
        config: the fine-tune's `config.json`; empty where there is none.
    """

    source: str
    base: Base
    matrices: dict[str, Matrix]
    dense: dict[str, Tensor]
    int8: dict[str, Tensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        tensors = [*self.dense.values(), *self.int8.values()]
        return sum(x.nbytes for x in tensors) + sum(m.nbytes for m in self.matrices.values())

    @property
    def planes(self) -> int:
        """Most bits of a weight."""
        return max((m.bits.shape[0] for m in self.matrices.values()), default=0)

    def weight(self, name: str) -> Tensor:
        """A tensor of the fine-tune itself, in floating point."""
        scale = self.int8.get(name)
        return self.dense[name] if scale is None else self.dense[name].float() * scale

    def tensors(self) -> dict[str, Tensor]:
        """All of it under the names that files have."""
        found = dict(self.dense)
        found |= {name + INT8_SCALE: x for name, x in self.int8.items()}
        for name, matrix in self.matrices.items():
            found |= {name: matrix.bits, name + SCALES: matrix.scales}
        return found


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix `[rows, columns]` in int8, and the scale of each row, float32 `[rows, 1]`."""
    wide = weight.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127
    return (wide / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8), scale


def metadata(tensors: dict[str, Tensor], checksums: dict[str, str]) -> dict[str, str]:
    """What a safetensors file says of its tensors, and of those of the base."""
    own = {name: checksum(x) for name, x in tensors.items()}
    return {"format": "pt", "checksums": json.dumps(own), "base": json.dumps(checksums)}


def is_delta(config: dict[str, Any]) -> bool:
    """True for the `config.json` of a delta."""
    about = config.get("quantization_config")
    return isinstance(about, dict) and about.get("quant_method") == METHOD


def read(folder: Path) -> Delta:
    """A delta from its folder.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: it is not a delta, or is damaged; the message says which file and tensor.
    """
    config = read_config(folder)
    about = config["quantization_config"]
    tensors: dict[str, Tensor] = {}
    base: dict[str, str] = {}
    for path in files_of(folder):
        found, checksums = _read_file(path)
        tensors |= found
        base |= checksums
    digest = about["base_digest"]
    if of_model(base) != digest:
        raise ValueError(say(str(folder), f"checksums of the base with digest {digest[:16]}", "others", _AGAIN))
    return sort(str(folder), tensors, Base(about.get("base"), about.get("revision"), digest, base), config)


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a delta's folder; raises as `read`."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(say(str(folder), "the folder of a delta, with a config.json", "none", "Check the path"))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(say(str(path), "JSON", error, _AGAIN)) from error
    if not isinstance(config, dict) or not is_delta(config):
        advice = "Make one: hf-longctx delta compress --base BASE --finetuned FINETUNED -o out/"
        raise ValueError(say(str(path), "a quantization_config with quant_method 'bitdelta'", "none", advice))
    about = config["quantization_config"]
    if about.get("version") != VERSION:
        raise ValueError(say(str(path), f"version {VERSION}", about.get("version"), "Upgrade hf_longctx"))
    if not isinstance(about.get("base_digest"), str):
        raise ValueError(say(str(path), "base_digest", "none", _AGAIN))
    return config


def files_of(folder: Path) -> list[Path]:
    """The safetensors files of a folder."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(say(str(index), "an index of safetensors files", repr(error), _AGAIN)) from error
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ValueError(say(str(index), "names of files beside it", names, _AGAIN))
    else:
        names = [ONE_FILE]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(say(str(folder), f"{len(names)} safetensors files", f"no {missing[0]}", _AGAIN))
    return [folder / name for name in names]


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of one file, each as it was written, and checksums of the base's."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        own, base = json.loads(about["checksums"]), json.loads(about["base"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(say(str(path), "a whole safetensors file of a delta", repr(error), _AGAIN)) from error
    wrong = [name for name, x in tensors.items() if own.get(name) != checksum(x)]
    if wrong:
        raise ValueError(say(f"{path}, {wrong[0]}", "the values that were written", "others", _AGAIN))
    return tensors, base


def sort(source: str, tensors: dict[str, Tensor], base: Base, config: dict[str, Any]) -> Delta:
    """Tensors of files as a delta.

    Raises:
        ValueError: a tensor that has no meaning, or scales without one.
    """
    matrices, dense, int8 = {}, {}, {}
    left = dict(tensors)
    for name, x in tensors.items():
        if x.dtype == torch.int32:
            scales = left.pop(name + SCALES, None)
            matrices[name] = _matrix(f"{source}, {name}", left.pop(name), scales)
        elif x.dtype == torch.int8:
            scale = left.pop(name + INT8_SCALE, None)
            if x.ndim != 2 or scale is None or scale.shape != (len(x), 1) or not bool(scale.isfinite().all()):
                raise ValueError(
                    say(f"{source}, {name}", "a matrix in int8 and finite scales of its rows", "none", _AGAIN)
                )
            dense[name], int8[name] = left.pop(name), scale.float()
    for name, x in left.items():
        if not x.is_floating_point():
            raise ValueError(say(f"{source}, {name}", "int32, int8 or floating point", x.dtype, _AGAIN))
        if not bool(x.isfinite().all()):
            raise ValueError(say(f"{source}, {name}", "finite numbers", "others", _AGAIN))
    return Delta(source, base, matrices, {**dense, **left}, int8, config)


def _matrix(where: str, bits: Tensor, scales: Tensor | None) -> Matrix:
    """Words and scales that go together."""
    if scales is None:
        raise ValueError(say(where, "scales beside the signs", "none", _AGAIN))
    if bits.ndim != 3 or 0 in bits.shape:
        raise ValueError(say(where, "words as [planes, outputs, inputs / 32]", tuple(bits.shape), _AGAIN))
    planes, rows, words = bits.shape
    shape = tuple(scales.shape)
    if scales.dtype != torch.float32 or len(shape) != 3 or shape[0] != planes or shape[1] not in (1, rows):
        raise ValueError(say(where, f"float32 scales [{planes}, 1 or {rows}, groups]", (scales.dtype, shape), _AGAIN))
    if shape[2] == 0 or words % shape[2]:
        raise ValueError(say(where, f"groups of whole words of {WORD} inputs", f"{shape[2]} groups", _AGAIN))
    if not bool(scales.isfinite().all()):
        raise ValueError(say(where, "finite scales", "others", _AGAIN))
    if not bool((scales.flatten(1) != 0).any(1).all()):
        raise ValueError(say(where, "scales other than zero", "none but zero: the matrix says nothing", _AGAIN))
    return Matrix(bits, scales)
