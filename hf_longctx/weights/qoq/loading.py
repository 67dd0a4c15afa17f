"""What transformers' loader does with the weight of a linear layer that is to be rounded."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.core_model_loading import ConversionOps

from .config import QoQConfig
from .experts import FUSED, QoQExperts, rounded
from .grids import nearest_grid
from .linear import QoQLinear, packed_tensors


class RoundWeight(ConversionOps):
    """A weight to the nearest codes; its layer becomes a `QoQLinear`, bias and all."""

    def __init__(self, config: QoQConfig) -> None:
        self.config = config

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Tensors of the quantized layer by full name.

        Raises:
            ValueError: a weight that is not finite; it is named.
        """
        assert model is not None
        assert full_layer_name is not None
        (value,) = input_dict.values()
        weight: Tensor = value[0] if isinstance(value, list) else value
        if not bool(weight.isfinite().all()):
            raise ValueError(f"QoQConfig: expected finite weights; got others in {full_layer_name}. Check the file.")
        owner, _, kind = full_layer_name.rpartition(".")
        if kind in FUSED:
            return self._experts(model, owner, kind, weight, kwargs.get("missing_keys"))
        name = owner
        old = model.get_submodule(name)
        made = QoQLinear(old.in_features, old.out_features, False, self.config, "meta")
        made.bias = old.bias
        model.set_submodule(name, made)
        grid = nearest_grid(weight, self.config)
        return {f"{name}.{part}": x for part, x in packed_tensors(grid, grid.codes(weight)).items()}

    def _experts(
        self, model: Any, name: str, kind: str, weights: Tensor, missing: set[str] | None
    ) -> dict[str, Tensor]:
        """The same for one of two tensors of experts, of which the first to come has the module replaced."""
        if not isinstance(model.get_submodule(name), QoQExperts):
            model.set_submodule(name, QoQExperts(model.get_submodule(name), self.config))
        if missing is not None:
            missing.discard(f"{name}.{kind}")
        return {f"{name}.{FUSED[kind]}.{part}": x for part, x in rounded(weights, self.config).items()}
