"""QoQ for transformers' loader: checkpoints of floating-point weights are rounded, those of QoQ are read."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from ..registry import announce
from .chosen import EXPERTS, chosen_experts, chosen_linears
from .config import PARTS, QoQConfig
from .split import Split, require_whole_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .experts import QoQMatrices
    from .linear import QoQLinear

_ADVICE = "Is it of this model? Convert or quantize it again: hf-longctx quantize"


class QoQQuantizer(HfQuantizer):
    """Replaces the linear layers of a decoder by `QoQLinear`, as its weights come in."""

    quantization_config: QoQConfig
    _published = False
    serialized_names = {"weight": list(PARTS)}  # noqa: RUF012 - transformers' own form

    @property
    def quantized_element_size(self) -> float:
        """Bytes of a weight, for the plan of devices."""
        return self.quantization_config.wbits / 8

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top."""
        return True

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Saved as any model."""
        return True

    def take_shapes(self, model: PreTrainedModel, source: Path) -> None:
        """Have a model on `meta` be of the shapes that a checkpoint gives it; errors as `chosen_linears`."""
        self._process_model_before_weight_loading(model)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """True for the weight of a linear layer that is rounded as it is loaded."""
        name, _, kind = param_name.rpartition(".")
        chosen = name in self._chosen if kind == "weight" else kind in EXPERTS and name in self._experts
        return not self.pre_quantized and chosen

    def get_quantize_ops(self) -> Any:
        """What rounds one weight."""
        from .loading import RoundWeight

        return RoundWeight(self.quantization_config)

    def validate_environment(self, *args: Any, weights_only: bool = True, **kwargs: Any) -> None:
        """Refuse to run what a published pickle might hold (ValueError)."""
        if hasattr(self.quantization_config, "format") and not weights_only:
            raise ValueError(
                "QoQConfig(format='omniserve'): expected weights_only=True, so that nothing in the file is run; got "
                "False. Leave it out."
            )

    def get_weight_conversions(self) -> Any:
        """What puts the layers of a published file in the order of ours."""
        from . import published

        return published.conversions(self.quantization_config, self._chosen) if self._published else []

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Parts of a published layer come as they are stored; transformers 5.17 has them so by itself."""
        from . import published

        if published.is_ours(converter):
            return None
        found: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return found

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        from .experts import QoQExperts
        from .linear import QoQLinear

        config, tensors = self.quantization_config, {}
        if hasattr(config, "format"):
            from . import omniserve, published

            self.quantization_config = config = copy(config)  # the caller's may serve again
            path = published.find(checkpoint_files)
            tensors = omniserve.open_file(path)
            published.settle(config, tensors, path)
            self.pre_quantized = self._published = True
        self._chosen = chosen_linears(model, config)
        self._experts = chosen_experts(model, config)
        self._split = Split.take(model, self._chosen)
        sizes = {}
        if self.pre_quantized:
            for name in self._chosen:
                old: Any = model.get_submodule(name)
                bias = old.bias is not None or f"{name}.bias" in tensors
                sizes[name] = (old.out_features, old.in_features)
                made = QoQLinear(old.in_features, old.out_features, bias, config, "meta", old.weight.dtype)
                model.set_submodule(name, made)
            for name in self._experts:
                model.set_submodule(name, QoQExperts(model.get_submodule(name), config))
        if self._published:
            published.check(model, tensors, config, sizes)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from .experts import QoQExperts, QoQMatrices
        from .linear import QoQLinear

        lost = [f"{name}.weight" for name in self._chosen if isinstance(model.get_submodule(name), nn.Linear)]
        lost += [name for name in self._experts if not isinstance(model.get_submodule(name), QoQExperts)]
        for name, module in model.named_modules():
            if isinstance(module, (QoQLinear, QoQMatrices)):
                lost += [f"{name}.{part}" for part in _unread(module, name, self.quantization_config)]
        if lost:
            shown = ", ".join(lost[:4]) + (f" and {len(lost) - 4} more" if len(lost) > 4 else "")
            raise ValueError(
                f"QoQ checkpoint: expected a tensor for each part of each weight; got none for {shown}. {_ADVICE}"
            )
        if self._experts:
            require_whole_model(model, "from_pretrained with experts")
        self._split.apply(model)
        if self._published:
            from . import published

            published.forget(model)
            model.config.quantization_config = self.quantization_config
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Any, dict[str, str]]:
        """As any model's, where it is whole."""
        require_whole_model(model, "save_pretrained")
        found: tuple[Any, dict[str, str]] = super().get_state_dict_and_metadata(model)  # type: ignore[no-untyped-call]
        return found

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from .experts import QoQExperts
        from .linear import QoQLinear

        require_whole_model(model, "dequantize")
        for name, module in list(model.named_modules()):
            if isinstance(module, QoQLinear):
                dense = nn.Linear(module.in_features, module.out_features, False, device="meta")
                dense.weight = nn.Parameter(module.dequantized(dtype or model.dtype))
                dense.register_parameter("bias", module.bias)
                model.set_submodule(name, dense)
            elif isinstance(module, QoQExperts):
                model.set_submodule(name, module.plain(dtype or model.dtype))
        return model


def _unread(module: QoQLinear | QoQMatrices, name: str, config: QoQConfig) -> list[str]:
    """Parts of a layer that no file had. The loader leaves those empty, with a line in a log.

    Raises:
        ValueError: a part of another shape, which some versions of the loader take as it comes.
    """
    from .experts import QoQMatrices
    from .linear import QoQLinear

    fresh: QoQLinear | QoQMatrices
    if isinstance(module, QoQMatrices):
        fresh = QoQMatrices(module.experts, module.in_features, module.out_features, config)
    else:
        fresh = QoQLinear(module.in_features, module.out_features, False, config, "meta")
    lost = []
    for part in PARTS:
        x, like = getattr(module, part), getattr(fresh, part)
        if like is None:
            continue
        if x.shape != like.shape or x.dtype != like.dtype:
            expected, got = (f"{y.dtype} {list(y.shape)}" for y in (like, x))
            raise ValueError(f"QoQ checkpoint: expected {expected} for {name}.{part}; got {got}. {_ADVICE}")
        x.requires_grad_(False)  # the loader gives every floating-point tensor a gradient
        if not x.is_meta and not getattr(x, "_is_hf_initialized", False):  # on meta: it stays on the disk
            lost.append(part)
    return lost


def declare(model: Any, config: QoQConfig) -> None:
    """Have a model whose layers were replaced here be one that is saved, reported and dequantized as QoQ."""
    quantizer: Any = QoQQuantizer(config, pre_quantized=True)
    quantizer._chosen, quantizer._experts = [], []
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.config.quantization_config = config


announce()  # again: the tables were filled while this file was only half there, if it was imported first
