"""Where in a model each tensor of a delta belongs, and which hook it needs there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ...errors import UnsupportedError
from .checkpoint import end_names
from .codes import Codes
from .embeddings import Table
from .experts import EXPERT, Experts, find
from .format import Delta
from .head import Head
from .hooks import Hook
from .message import say
from .signs import Signs
from .tables import Norm, Weights

_MERGE = "Load it alone with from_pretrained and call merge_delta, or keep a copy of the fine-tune"


@dataclass(frozen=True)
class Place:
    """What a tenant has on one layer.

    Attributes:
        kind: of the hook.
        names: of the delta's tensors, by parameter of the layer.
        tied: output embeddings are the tenant's input embeddings.
    """

    kind: type[Hook]
    names: dict[str, str] = field(default_factory=dict)
    tied: bool = False

    def load(self, delta: Delta) -> Mapping[str, Any]:
        """The tensors: a `Matrix` where there are signs."""
        parts: dict[str, Any] = {
            part: delta.matrices[name] if name in delta.matrices else self._dense(delta, name)
            for part, name in self.names.items()
        }
        return {**parts, "tied": True} if self.tied else parts

    def _dense(self, delta: Delta, name: str) -> Tensor | Codes:
        """A tensor of the fine-tune itself: tables as they are stored."""
        scale = delta.int8.get(name) if self.kind in (Table, Head) else None
        return delta.weight(name) if scale is None else Codes(delta.dense[name], scale)


def places_of(model: Any, delta: Delta) -> dict[str, Place]:
    """The layers on which a delta differs from its base, by name.

    Raises:
        UnsupportedError: a tensor belongs to something that cannot differ between rows.
    """
    first, last = (name.removesuffix(".weight") for name in end_names(model))
    found: dict[str, Place] = {}
    for name in (*delta.matrices, *delta.dense):
        key, _, part = name.rpartition(".")
        expert = EXPERT.fullmatch(name)
        if expert is not None:
            if name not in delta.matrices:
                raise UnsupportedError(say(name, "signs of an expert", "its weights", _MERGE))
            names = found.setdefault(expert["module"], Place(Experts)).names
            names[f"{expert['number']}.{expert['part']}"] = name
            continue
        module = model.get_submodule(key)
        kind = Signs if name in delta.matrices else _kind(name, module, key == first, key == last)
        before = found.get(key)
        if before is not None and before.kind is not kind:
            found[key] = Place(Weights, before.names)  # a bias beside a weight of 16 bits
        found.setdefault(key, Place(kind)).names[part] = name
    tied = delta.config.get("tie_word_embeddings", bool(getattr(model.config, "tie_word_embeddings", False)))
    if tied and first in found and f"{last}.weight" not in delta.dense:
        found[last] = Place(Head, found[last].names if last in found else {}, tied=True)
    return found


def weight_of(model: Any, name: str) -> tuple[Tensor, bool] | None:
    """The weight that a file names, in the model's own memory, and whether it is `[K, N]`; None: there is none."""
    expert = find(model, name)
    if expert is not None:
        module, at = expert
        return (at.view(module), False) if hasattr(module, at.tensor) else None
    try:
        module = model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None
    weight = getattr(module, name.rpartition(".")[2], None)
    turned = is_linear(module) and not hasattr(module, "in_features")
    return (weight, turned) if isinstance(weight, Tensor) else None


def is_linear(module: nn.Module) -> bool:
    """True for a layer `[..., K]` to `[..., N]` of whatever kind of weight."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D)) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def linear_shape(module: Any) -> tuple[int, int]:
    """`(N, K)` of a linear layer."""
    if hasattr(module, "in_features"):
        return int(module.out_features), int(module.in_features)
    return int(module.nf), int(module.nx)


def _kind(name: str, module: nn.Module, first: bool, last: bool) -> type[Hook]:
    """The hook for a tensor of the fine-tune itself."""
    if last:
        return Head
    if first or isinstance(module, nn.Embedding):
        return Table
    leaf, part = next(module.children(), None) is None, name.rpartition(".")[2]
    if (
        leaf
        and "norm" in type(module).__name__.lower()
        and {p for p, _ in module.named_parameters()} <= {"weight", "bias"}
    ):
        return Norm
    if is_linear(module) and part == "bias":
        return Signs
    if leaf and all(p.is_floating_point() for p in module.parameters()):
        return Weights
    raise UnsupportedError(say(name, "a layer that can differ from row to row", type(module).__name__, _MERGE))
