"""Whether a delta is one of this very model: names, shapes, settings, and every weight of the base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from .checkpoint import end_names
from .digest import same_weight
from .experts import EXPERT, find
from .format import Delta
from .message import say
from .places import is_linear, linear_shape, places_of, weight_of

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
        self._same: dict[tuple[str, str], bool] = {}

    def is_same(self, name: str, weight: Tensor, expected: str) -> bool:
        """Whether a weight is the one of a checksum; looked at once, as nothing trains a base that has tenants."""
        if (name, expected) not in self._same:
            self._same[name, expected] = same_weight(weight, expected)
        return self._same[name, expected]


def check(where: str, delta: Delta, known: Known) -> None:
    """Refuse a delta that is not one of this model.

    Raises:
        ValueError: a name, shape, setting or weight of the base that differs.
        UnsupportedError: something differs that cannot differ between rows of a batch.
    """
    here = f"delta '{where}' ({delta.source})"
    for name in (*delta.matrices, *delta.dense):
        _check_shape(f"{here}, {name}", name, delta, known)
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
    _check_base(here, delta, known)


def _check_shape(where: str, name: str, delta: Delta, known: Known) -> None:
    """A tensor's name and shape."""
    wanted = _shape_in(known.model, name, name in delta.matrices)
    found = delta.matrices[name].shape if name in delta.matrices else tuple(delta.dense[name].shape)
    if wanted is None:
        got = "none" if EXPERT.fullmatch(name) is None else "none, or experts in another form"
        raise ValueError(say(where, f"a name in {type(known.model).__name__}", got, "Is it a delta of another base?"))
    own_vocabulary = name in known.ends and len(found) == 2 and found[1:] == wanted[1:]
    if wanted != found and not own_vocabulary:
        raise ValueError(say(where, f"a tensor of shape {wanted}", found, "Is it a delta of another base?"))


def _shape_in(model: Any, name: str, signs: bool) -> tuple[int, ...] | None:
    """The shape that a tensor should have, or None: there is nothing for it."""
    expert, (key, _, part) = find(model, name), name.rpartition(".")
    if expert is not None:
        return expert[1].shape
    try:
        module = model.get_submodule(key)
    except AttributeError:
        return None
    if signs or (part == "bias" and is_linear(module)):
        shape = linear_shape(module) if is_linear(module) else None
        return shape if shape is None or part == "weight" else shape[:1]
    own = getattr(module, part, None)
    return tuple(own.shape) if isinstance(own, Tensor) else None


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


def _check_base(where: str, delta: Delta, known: Known) -> None:
    """Every weight of the base is the one that the delta is a difference from; quantized ones cannot be compared."""
    other = []
    for name, expected in delta.base.checksums.items():
        there = weight_of(known.model, name)
        weight = None if there is None else there[0]
        if weight is None and not _is_quantized(known.model, name):
            other.append(name)
        elif weight is not None and weight.is_floating_point() and weight.dtype.itemsize > 1:
            if weight.device.type == "meta":
                raise UnsupportedError(
                    say(where, "a base whose weights are in memory", f"{name} elsewhere", "Do not offload")
                )
            if not known.is_same(name, weight, expected):
                other.append(name)
    if other:
        shown = ", ".join(other[:_SHOWN]) + (f" and {len(other) - _SHOWN} more" if len(other) > _SHOWN else "")
        advice = f"Load the base that it was made from: {delta.base.name}"
        raise ValueError(say(where, "the base that it is a difference from", f"other weights in {shown}", advice))


def _is_quantized(model: Any, name: str) -> bool:
    """True if a weight is held in another form by its layer."""
    if find(model, name) is not None:
        return True
    try:
        module = model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return False
    return not isinstance(module, torch.nn.Linear) and is_linear(module)
