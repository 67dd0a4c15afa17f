"""Which weights of a model are quantized: the linear layers of its decoder, and its experts; never a router."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from ...errors import UnsupportedError
from .config import PER_CHANNEL, QoQConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORM = {"is_transposed": False, "has_bias": False, "has_gate": True, "is_concatenated": True}
"""What transformers says of a module of experts that is like Mixtral's."""
EXPERTS = ("gate_up_proj", "down_proj")
"""Names of the tensors of such a module."""


def chosen_linears(model: PreTrainedModel, config: QoQConfig) -> list[str]:
    """Names of the linear layers of a model that are quantized: all of the decoder's layers, but for routers.

    Raises:
        ValueError: there is nothing to quantize, or one whose channels do not fit; it is named.
        UnsupportedError: experts in one tensor, of another form than Mixtral's.
    """
    inside, head = list(_inside(model, config)), model.get_output_embeddings()  # type: ignore[no-untyped-call]
    routers = {name for parent, count in _mixtures(model) for name in _routers(model, parent, count)}
    found = []
    for name, module in inside:
        fused = [key for key, x in module.named_parameters(recurse=False) if x.ndim > 2]
        if fused and not is_known(module):
            raise UnsupportedError(
                f"QoQConfig: expected experts as linear layers, or as those of Mixtral; got {name}.{fused[0]} in "
                f"'{model.config.model_type}'. Leave them as they are: modules_to_not_convert=['experts']."
            )
        if fused:
            _check_fit(name, module.gate_up_proj.shape[2], config)
            _check_fit(name, module.down_proj.shape[2], config)
        elif isinstance(module, nn.Linear) and name not in routers and module is not head:
            _check_fit(name, module.in_features, config)
            found.append(name)
    if not found and not chosen_experts(model, config):
        raise ValueError(
            f"QoQConfig: expected linear layers in the decoder of '{model.config.model_type}'; got none to quantize. "
            "Load the model as it is."
        )
    return found


def chosen_experts(model: PreTrainedModel, config: QoQConfig) -> list[str]:
    """Names of the modules of experts that are quantized, after `chosen_linears` has found no fault with them."""
    return [name for name, module in _inside(model, config) if is_known(module)]


def _inside(model: PreTrainedModel, config: QoQConfig) -> Iterator[tuple[str, Any]]:
    """Modules of the decoder's layers that are not left out."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    excluded = list(config.modules_to_not_convert or ())
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    inside = {id(module) for module in getattr(decoder, "layers", decoder).modules()}
    for name, module in model.named_modules():
        if id(module) in inside and should_convert_module(name, excluded):
            yield name, module


def is_known(module: Any) -> bool:
    """True for a module of experts with `gate_up_proj` `[E, 2I, H]` and `down_proj` `[E, H, I]`, gated as Mixtral's."""
    from transformers.integrations import moe

    if {name: getattr(module, name, None) for name in _FORM} != _FORM or getattr(module, "has_post_expert_norm", False):
        return False
    names = {name for name, _ in module.named_parameters(recurse=False)}
    gate = getattr(type(module), "_apply_gate", None)
    return names == set(EXPERTS) and gate is getattr(moe, "_default_apply_gate", module)


def _mixtures(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """Names of the modules that have experts in one tensor, and how many."""
    for name, module in model.named_modules():
        for _, x in module.named_parameters(recurse=False):
            if x.ndim > 2 and name.rpartition(".")[2] == "experts":
                yield name.rpartition(".")[0], len(x)
                break


def _routers(model: PreTrainedModel, parent: str, experts: int) -> Iterator[str]:
    """Linear layers beside experts that say how much of each a token gets, or of the one that all have."""
    for name, module in model.get_submodule(parent).named_modules():
        if isinstance(module, nn.Linear) and module.out_features in (1, experts):
            yield f"{parent}.{name}"


def _check_fit(name: str, width: int, config: QoQConfig) -> None:
    unit = 32 if config.group_size == PER_CHANNEL else config.group_size
    if width % unit == 0:
        return
    smaller = [size for size in (64, 32) if size < unit and width % size == 0]
    advice = f"Use group_size={smaller[0]}" if smaller else f"Leave it out: modules_to_not_convert=['{name}']"
    raise ValueError(f"QoQConfig: expected input channels in multiples of {unit}; got {width} in {name}. {advice}.")
