"""Adapters of PEFT on QoQ layers: the 4-bit weight stays as it is, its output's gradient goes straight through."""

from __future__ import annotations

from typing import Any, TypeVar

from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear

from ...errors import UnsupportedError
from .experts import FUSED, QoQExperts
from .linear import QoQLinear

C = TypeVar("C", bound=LoraConfig)


class QoQLoraLinear(LoraLinear):
    """A QoQ layer and low-rank adapters beside it; never inside it, as a sum is no longer on the grid."""

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused."""
        raise UnsupportedError(
            "merge: expected weights in floating point under the adapter; got QoQ weights. Keep the adapter apart, or "
            "merge it into model.dequantize() and quantize that."
        )


def lora_on_qoq(model: Any, config: C) -> C:
    """Have a `LoraConfig` take QoQ layers, for `get_peft_model` and, as `config=`, for `PeftModel.from_pretrained`.

    Args:
        model: a QoQ model.
        config: changed in place; `target_modules="all-linear"` means its QoQ layers.

    Returns:
        The same object.

    Raises:
        ValueError: the model has no QoQ layer, or the adapter reads the weight (DoRA) or is one of experts.
    """
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, QoQLinear)}
    if not names:
        raise ValueError("lora_on_qoq: expected a QoQ model; got one without a QoQ layer. PEFT takes it as it is.")
    if config.use_dora:
        raise ValueError("lora_on_qoq: expected plain LoRA; got use_dora=True, which reads the weight. Leave it out.")
    experts = [name for name in getattr(config, "target_parameters", None) or () if _is_of_experts(model, name)]
    if experts:
        raise ValueError(
            f"lora_on_qoq: expected adapters on linear layers; got target_parameters with {experts[0]}, experts of few "
            "bits. Leave it out, or leave experts as they are: modules_to_not_convert=['experts']."
        )
    if config.target_modules == "all-linear":
        config.target_modules = sorted(names)
    config._register_custom_module({QoQLinear: QoQLoraLinear})
    return config


def _is_of_experts(model: Any, name: str) -> bool:
    """True if a parameter's name, or the end of it, is one that quantized experts have or had."""
    owners = [key for key, module in model.named_modules() if isinstance(module, QoQExperts)]
    known = {f".{key}.{part}" for key in owners for part in FUSED}
    known |= {f".{key}.{part}.weight" for key in owners for part in FUSED.values()}
    return any(each.endswith(f".{name}") for each in known)
