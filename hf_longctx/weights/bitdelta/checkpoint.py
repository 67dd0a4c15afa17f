"""Checkpoints of transformers, tensor by tensor: no model is ever whole in memory."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .format import INDEX, ONE_FILE
from .message import say

_NEEDED = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
_UNPACKED = ("gate", "router", "classifier")
"""Last names of linear layers that choose or judge: small, and a small error there turns a choice over."""


@dataclass(frozen=True)
class Checkpoint:
    """Safetensors files of a model.

    Attributes:
        name: as the caller gave it.
        folder: where they are.
        revision: commit on the hub, or None.
        files: by tensor, as the files name it.
    """

    name: str
    folder: Path
    revision: str | None
    files: dict[str, Path]

    @staticmethod
    def open(name: str, revision: str | None = None) -> Checkpoint:
        """Find the files in a folder, or fetch them from the hub.

        Raises:
            FileNotFoundError: there are no safetensors files.
            ValueError: they are damaged.
        """
        folder, commit = fetch(name, revision)
        index = folder / INDEX
        paths = [folder / ONE_FILE]
        if index.is_file():
            try:
                paths = [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(
                    say(str(index), "an index of safetensors files", repr(error), "Fetch it again")
                ) from error
        files: dict[str, Path] = {}
        for path in paths:
            if not path.is_file():
                advice = "Save it with save_pretrained, which writes safetensors"
                raise FileNotFoundError(say(str(folder), "safetensors files", f"no {path.name}", advice))
            try:
                with safe_open(path, "pt") as file:
                    files |= dict.fromkeys(file.keys(), path)
            except SafetensorError as error:
                raise ValueError(say(str(path), "a safetensors file", error, "Fetch it again")) from error
        return Checkpoint(name, folder, commit, files)

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.folder)

    def tensor(self, key: str) -> Tensor:
        """One tensor, in memory of its own."""
        with safe_open(self.files[key], "pt") as file:
            found: Tensor = file.get_tensor(key)
        return found

    def sizes(self) -> dict[str, int]:
        """Elements of each tensor; nothing is read but headers."""
        found: dict[str, int] = {}
        for path in sorted(set(self.files.values())):
            with safe_open(path, "pt") as file:
                found |= {key: math.prod(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        return found

    def fingerprint(self) -> str:
        """Changes when files do; for a run that goes on where another one ended."""
        files = sorted(set(self.files.values()))
        about = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return hashlib.sha256(repr(about).encode()).hexdigest()[:16]


def fetch(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The folder of a model, and the commit if it comes from the hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder, None
    if folder.is_absolute() or name.startswith("."):
        raise FileNotFoundError(say("delta", "a folder, or an id on the hub", name, "Check the path"))
    from huggingface_hub import snapshot_download

    found = Path(snapshot_download(name, revision=revision, allow_patterns=_NEEDED))
    return found, found.name


@dataclass(frozen=True)
class Layout:
    """What the tensors of a model are.

    Attributes:
        model: on the meta device.
    """

    model: Any

    @staticmethod
    def of(config: Any) -> Layout:
        """From a configuration."""
        import transformers

        kind: Any = getattr(transformers, (config.architectures or [""])[0], None) or transformers.AutoModelForCausalLM
        with torch.device("meta"):
            made = kind.from_config(config) if hasattr(kind, "from_config") else kind._from_config(config)
        return Layout(made)

    @cached_property
    def packed(self) -> dict[str, bool]:
        """Weights of linear layers between embeddings and head, and whether they are stored as `[K, N]`."""
        return packed_weights(self.model)

    @cached_property
    def kinds(self) -> dict[str, str]:
        """What each parameter is, in a word, for a report."""
        found = {}
        embedding, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        for name, module in self.model.named_modules():
            for own in module._parameters:
                full = f"{name}.{own}" if name else own
                if module is head:
                    kind = "head"
                elif module is embedding or isinstance(module, nn.Embedding):
                    kind = "embeddings"
                elif "norm" in type(module).__name__.lower():
                    kind = "norms"
                else:
                    kind = "biases" if own == "bias" else "others"
                found[full] = kind
        return found

    @cached_property
    def ends(self) -> tuple[str, str]:
        """Names of the weights of input and output embeddings."""
        return end_names(self.model)

    @cached_property
    def _renamings(self) -> tuple[Any, ...]:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key

        rules = [rule for rule in get_model_conversion_mapping(self.model) or [] if isinstance(rule, WeightRenaming)]
        return rename_source_key, rules, self.model.base_model_prefix, self.model.state_dict()

    def name(self, key: str) -> str:
        """A tensor of a file under the name that the model has for it; each expert stays apart."""
        rename, rules, prefix, state = self._renamings
        found: str = rename(key, rules, [], prefix, state)[0]
        return found


def packed_weights(model: Any) -> dict[str, bool]:
    """Names of the weights that are stored as signs, and whether the model has them as `[K, N]`."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {}
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if module is not head and isinstance(module, (nn.Linear, Conv1D)) and last not in _UNPACKED:
            found[f"{name}.weight"] = isinstance(module, Conv1D)
    return found


def end_names(model: Any) -> tuple[str, str]:
    """Names of the weights of input and output embeddings; empty where there is none."""
    modules = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    return modules.get(id(model.get_input_embeddings()), ""), modules.get(id(model.get_output_embeddings()), "")
