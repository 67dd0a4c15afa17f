"""QoQ checkpoints in vLLM: what `hf-longctx quantize` writes is served as it is. Only vLLM imports this."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.quantizers_utils import should_convert_module
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import set_weight_attrs

from ..errors import UnsupportedError
from ..kernels.linear import ROWS, PackedWeight, quantize_tokens, w4a8_linear
from ..weights.qoq.config import PARTS, QoQConfig
from ..weights.qoq.linear import QoQLinear

_SHARDS = {"q": 0, "k": 1, "v": 2}
_ADVICE = "Is it of this model? Quantize it again: hf-longctx quantize"


class QoQ(QuantizationConfig):  # type: ignore[misc]  # vLLM's classes are not known where it is not installed
    """A QoQ checkpoint's `quantization_config`. Keys and values stay in vLLM's own cache, whatever `kv_bits` says."""

    def __init__(self, settings: QoQConfig) -> None:
        super().__init__()
        self.settings = settings

    @classmethod
    def get_name(cls) -> str:
        """What `config.json` calls it."""
        return "qoq"

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """All three."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Integer tensor cores of 8.0."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """All is in `config.json`."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QoQ:
        """Raises ValueError where `QoQConfig` does."""
        return cls(QoQConfig(**config))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        """For linear layers; None for all others.

        Raises:
            UnsupportedError: experts; a layer that vLLM makes of several, of which only some are quantized.
        """
        if any(kind.__name__ == "FusedMoE" for kind in type(layer).__mro__):
            raise UnsupportedError(
                f"QoQ in vLLM: expected a model without experts; got {prefix}. Serve it through transformers."
            )
        if not isinstance(layer, LinearBase):
            return None
        head, _, name = prefix.rpartition(".")
        parts = [f"{head}.{part}" for part in self.packed_modules_mapping.get(name, [name])]
        excluded = list(self.settings.modules_to_not_convert or ())
        chosen = [should_convert_module(part, excluded) for part in parts]
        if any(chosen) != all(chosen):
            raise UnsupportedError(
                f"QoQ in vLLM: expected {', '.join(parts)} to be quantized together, as vLLM makes one layer of them; "
                f"got modules_to_not_convert={excluded}. Name all of them or none, and quantize again."
            )
        return QoQMethod(self.settings) if all(chosen) else UnquantizedLinearMethod()


class QoQMethod(LinearMethodBase):  # type: ignore[misc]
    """Integer products of one linear layer, or of several that read the same input."""

    def __init__(self, settings: QoQConfig) -> None:
        self.settings = settings

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        """Room for the parts of each layer, one after the other.

        Raises:
            UnsupportedError: tensor parallelism.
        """
        if get_tensor_model_parallel_world_size() > 1:
            raise UnsupportedError(
                "QoQ in vLLM: expected weights that are whole on a device; got tensor parallelism. "
                "Serve with --tensor-parallel-size 1."
            )
        layer.qoq_sizes, layer.qoq_columns, layer.qoq_loaded = output_partition_sizes, input_size, set()
        shapes = [QoQLinear(input_size, size, False, self.settings, "meta") for size in output_partition_sizes]
        for name in PARTS:
            parts = [getattr(shape, name) for shape in shapes]
            if parts[0] is None:
                continue
            ends = [0, *accumulate(len(part) for part in parts)]
            room = torch.empty(ends[-1], *parts[0].shape[1:], dtype=parts[0].dtype)
            param = nn.Parameter(room, requires_grad=False)
            set_weight_attrs(param, {"weight_loader": partial(_load, layer, name, ends)})
            layer.register_parameter(name, param)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Cut the weight into pieces that kernels take: one, where all layers but the last fill their panels.

        Raises:
            ValueError: a part that no file had.
        """
        names = [name for name in PARTS if hasattr(layer, name)]
        sizes: list[int] = layer.qoq_sizes
        lost = {(name, i) for name in names for i in range(len(sizes))} - layer.qoq_loaded
        if lost:
            raise ValueError(f"QoQ checkpoint: expected all parts of {layer.prefix}; got none for {lost}. {_ADVICE}.")
        whole = all(size % ROWS == 0 for size in sizes[:-1])
        layer.qoq_pieces = [sum(sizes)] if whole else sizes

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[..., K]` to `[..., N]`, dtype of x."""
        parts = (getattr(layer, name, None) for name in PARTS)
        flat = x.reshape(-1, x.shape[-1])
        out: Tensor = torch.ops.hf_longctx_vllm.qoq_linear(flat, *parts, bias, layer.qoq_pieces)
        return out.view(*x.shape[:-1], -1)


def _load(layer: Any, name: str, ends: Sequence[int], param: Tensor, loaded: Tensor, shard: Any = None) -> None:
    """Take one tensor of a checkpoint.

    Raises:
        ValueError: it has another shape or dtype than it should.
    """
    count = len(ends) - 1
    first, last = (0, count) if shard is None else (_SHARDS.get(shard, shard), _SHARDS.get(shard, shard) + 1)
    room = param.data[ends[first] : ends[last]]
    if room.shape != loaded.shape or room.dtype != loaded.dtype:
        expected, got = (f"{x.dtype} {list(x.shape)}" for x in (room, loaded))
        raise ValueError(f"QoQ checkpoint: expected {expected} for {layer.prefix}.{name}; got {got}. {_ADVICE}.")
    room.copy_(loaded)
    layer.qoq_loaded |= {(name, i) for i in range(first, last)}


@torch.library.custom_op("hf_longctx_vllm::qoq_linear", mutates_args=())
def qoq_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    groups: Tensor | None,
    bias: Tensor | None,
    pieces: Sequence[int],
) -> Tensor:
    """An operation that compilers take as it is; `x`: `[M, K]`, of layers with so many outputs each."""
    tokens, row, panel = quantize_tokens(x), 0, 0
    made: list[Tensor] = []
    for size in pieces:
        own, panels = slice(row, row + size), slice(panel, panel - (-size // ROWS))
        weight = PackedWeight(
            codes[panels].view((panels.stop - panel) * ROWS, -1),
            scale[own],
            None if shift is None else shift[own],
            None if groups is None else groups[panels],
            x.shape[1],
        )
        made.append(w4a8_linear(tokens, weight, None if bias is None else bias[own].float(), x.dtype))
        row, panel = own.stop, panels.stop
    return made[0] if len(made) == 1 else torch.cat(made, 1)


@qoq_linear.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor, *parts: Any) -> Tensor:
    return x.new_empty(len(x), len(scale))
