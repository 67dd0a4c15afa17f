"""Published folders of QServe models under transformers' loader: found, checked, and read layer by layer.

Their `config.json` says nothing of a quantization, and an index of the base model's shards, which are not there, lies
beside the one file of tensors. So the caller says what it is: `QoQConfig(format="omniserve")`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter

from . import omniserve
from .config import QoQConfig


def find(files: list[str] | None) -> Path:
    """The file of tensors, which takes the place of what the loader would read.

    Raises:
        ValueError: there is none.
    """
    path = None if not files else Path(files[0]).parent / omniserve.FILE
    if files is None or path is None or not path.is_file():
        raise ValueError(
            f"QoQConfig(format='omniserve'): expected {omniserve.FILE} in the model's folder; got none. Leave out "
            "`format` for other folders; pass use_safetensors=False with a hub id."
        )
    files[:] = [str(path)]
    return path


def settle(config: QoQConfig, tensors: dict[str, Tensor], path: Path) -> None:
    """Take bits and groups over from a file.

    Raises:
        ValueError: it is no quantized one.
    """
    found = omniserve.config_of(tensors)
    if found is None:
        raise ValueError(
            f"QoQConfig(format='omniserve'): expected quantized layers in {path.name}; got none. Leave out `format`."
        )
    config.wbits, config.group_size = found.wbits, found.group_size
    del config.format


def check(model: Any, tensors: dict[str, Tensor], config: QoQConfig, sizes: dict[str, tuple[int, int]]) -> None:
    """Refuse a file that is not one of the model, before anything of it is loaded.

    Args:
        model: its quantized layers are `QoQLinear`, without tensors.
        tensors: of the file, by name.
        config: bits and groups of the file.
        sizes: output and input channels of the quantized layers, by name.

    Raises:
        ValueError: tensors that are missing, too many, of other shapes, or not those of a folded model; names them.
    """
    layers, rest = omniserve.sorted_out(tensors)
    expected = {
        name: x.shape
        for name, x in model.state_dict().items()
        if name.endswith(".bias") or name.rpartition(".")[0] not in sizes
    }
    tied = model.all_tied_weights_keys if model.config.tie_word_embeddings else {}
    missing = [f"{name}.{omniserve.parts_in(config)[0]}" for name in sizes.keys() - layers.keys()]
    missing += [name for name in expected.keys() - rest.keys() - set(tied) if "norm" not in name]
    extra = [*(layers.keys() - sizes.keys()), *(rest.keys() - expected.keys())]
    other = [name for name in expected.keys() & rest.keys() if expected[name] != rest[name].shape]
    other += [name for name, source in tied.items() if name in rest and not torch.equal(rest[name], rest[source])]
    for names, what in ((missing, "are missing"), (extra, "are too many"), (other, "have another shape or value")):
        if names:
            shown = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ValueError(
                f"omniserve checkpoint: expected the tensors of '{model.config.model_type}' as config.json has it; got "
                f"some that {what}: {shown}. Take both files of one model."
            )
    for name, size in sizes.items():
        omniserve.check_layer(name, layers[name], config, *size)
    for name, x in rest.items():
        omniserve.check_norm(name, x)
    # Norms that are left out are ones, as the loader makes them.
    model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), r"norm\.weight$"}
    skipped = {name.replace(".", r"\.") + "$" for name in omniserve.SKIPPED}
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *skipped}


class Repack(ConversionOps):
    """The parts of a layer, put in the order of `QoQLinear`."""

    def __init__(self, config: QoQConfig, names: dict[str, str]) -> None:
        self.config = config
        self.names = names  # of the parts, by the pattern that finds them

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], full_layer_name: str | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Tensors of the quantized layer by full name."""
        assert full_layer_name is not None
        parts = {self.names[pattern]: x[0] if isinstance(x, list) else x for pattern, x in input_dict.items()}
        made = omniserve.repacked(parts, self.config)
        return {f"{full_layer_name.removesuffix('.weight')}.{name}": x for name, x in made.items()}


def conversions(config: QoQConfig, chosen: list[str]) -> list[WeightConverter]:
    """For the loader: from a file's parts of the chosen layers to theirs."""
    ends = sorted({name.rpartition(".")[2] for name in chosen})
    layer = "(?:" + "|".join(rf"(?<=\.{end})" for end in ends) + ")"
    names = {rf"{layer}\.{part}$": part for part in omniserve.parts_in(config)}
    return [WeightConverter(list(names), ".weight", [Repack(config, names)])]


def is_ours(converter: Any) -> bool:
    """Whether a conversion of the loader is one of these."""
    return any(isinstance(op, Repack) for op in getattr(converter, "operations", ()))


def forget(model: Any) -> None:
    """Have the model saved as it is now, not as the file was."""
    model._weight_conversions = [x for x in getattr(model, "_weight_conversions", None) or [] if not is_ours(x)]
