"""Whether a delta is one of this very model: names, shapes, settings, and every weight of the base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from .checkpoint import end_names
from .digest import weight_checksum
from .format import Delta
from .message import say
from .places import is_linear, linear_shape, places_of

_SHOWN = 3
_FREE = {
    "architectures", "auto_map", "custom_pipelines", "dtype", "finetuning_task", "id2label", "label2id",
    "max_position_embeddings", "name_or_path", "num_labels", "prefix", "pretraining_tp", "problem_type",
    "quantization_config", "return_dict", "tie_word_embeddings", "task_specific_params", "torch_dtype",
    "transformers_version", "unsloth_version", "use_cache", "vocab_size",
}  # fmt: skip
_FREE_PARTS = ("dropout", "token_id", "token_index", "initializer", "loss", "output_")
"""What a configuration says that does not change what given weights compute, and the vocabulary, which may differ."""


class Known:
    """What was found out about a model, once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.ends = end_names(model)
        self._checksums: dict[str, str] = {}

    def weights(self) -> dict[str, Tensor]:
        """All parameters; tied ones under each of their names."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    def checksum(self, name: str, weight: Tensor) -> str:
        """As in the files of deltas; computed once, as nothing trains a base that has tenants."""
        if name not in self._checksums:
            self._checksums[name] = weight_checksum(weight)
        return self._checksums[name]


def check(where: str, delta: Delta, known: Known) -> None:
    """Refuse a delta that is not one of this model.

    Raises:
        ValueError: a name, shape, setting or weight of the base that differs.
        UnsupportedError: something differs that cannot differ between rows of a batch.
    """
    here, weights = f"delta '{where}' ({delta.source})", known.weights()
    for name in (*delta.matrices, *delta.dense):
        _check_shape(f"{here}, {name}", name, delta, known, weights)
    decoder = known.model.get_decoder()
    inside = {id(module) for module in decoder.modules()} | {id(known.model.get_output_embeddings())}
    for key in places_of(known.model, delta):
        if id(known.model.get_submodule(key)) not in inside:
            advice = "Load it alone with from_pretrained, or merge it"
            raise UnsupportedError(say(f"{here}, {key}", "differences in the text decoder", "another part", advice))
    changed = list(_settings(delta, known.model.config))
    if changed:
        advice = "One model computes all rows with the same settings: load this fine-tune alone with from_pretrained"
        raise UnsupportedError(say(here, "the base's configuration", "; ".join(changed[:_SHOWN]), advice))
    _check_base(here, delta, known, weights)


def _check_shape(where: str, name: str, delta: Delta, known: Known, weights: dict[str, Tensor]) -> None:
    """A tensor's name and shape."""
    advice = "Is it a delta of another base?"
    key, _, part = name.rpartition(".")
    try:
        module = known.model.get_submodule(key)
    except AttributeError:
        raise ValueError(say(where, f"a name in {type(known.model).__name__}", "none", advice)) from None
    wanted: tuple[int, ...] | None
    found: tuple[int, ...]
    if name in delta.matrices:
        wanted, found = (
            linear_shape(module) if part == "weight" and is_linear(module) else None,
            delta.matrices[name].shape,
        )
    else:
        own, found = weights.get(name), tuple(delta.dense[name].shape)
        wanted = None if own is None else tuple(own.shape)
        if wanted is not None and name in known.ends and len(found) == 2 and found[1:] == wanted[1:]:
            return  # a vocabulary of its own
        if own is None and part == "bias" and is_linear(module):
            wanted = linear_shape(module)[:1]
    if wanted != found:
        raise ValueError(say(where, f"a tensor of shape {wanted}", found, advice))


def _settings(delta: Delta, config: Any) -> Iterator[str]:
    """Settings of the fine-tune that change what is computed, each with both values."""
    if not delta.config:
        return
    told = {key: value for key, value in delta.config.items() if key != "quantization_config"}
    ours, theirs = (c.get_text_config(decoder=True).to_dict() for c in (config, type(config).from_dict(told)))
    for key in sorted(ours.keys() | theirs.keys()):
        free = key in _FREE or key.startswith("_") or any(part in key for part in _FREE_PARTS)
        if not free and ours.get(key) != theirs.get(key):
            yield f"{key}: {theirs.get(key)!r} in place of {ours.get(key)!r}"


def _check_base(where: str, delta: Delta, known: Known, weights: dict[str, Tensor]) -> None:
    """Every weight of the base is the one that the delta is a difference from; quantized ones cannot be compared."""
    other = []
    for name, expected in delta.base.checksums.items():
        weight = weights.get(name)
        if weight is None and not _is_quantized(known.model, name):
            other.append(name)
        elif weight is not None and weight.is_floating_point() and weight.dtype.itemsize > 1:
            if weight.device.type == "meta":
                raise UnsupportedError(
                    say(where, "a base whose weights are in memory", f"{name} elsewhere", "Do not offload")
                )
            if known.checksum(name, weight) != expected:
                other.append(name)
    if other:
        shown = ", ".join(other[:_SHOWN]) + (f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else "")
        advice = f"Load the base that it was made from: {delta.base.name}"
        raise ValueError(say(where, "the base that it is a difference from", f"other weights in {shown}", advice))


def _is_quantized(model: Any, name: str) -> bool:
    """True if a weight is held in another form by its layer."""
    try:
        module = model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return False
    return not isinstance(module, torch.nn.Linear) and is_linear(module)
