"""QoQ layers as vLLM makes them: several of a checkpoint in one, loaded part by part."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_longctx.errors import UnsupportedError
from hf_longctx.weights.qoq.config import QoQConfig
from hf_longctx.weights.qoq.grids import nearest_grid
from hf_longctx.weights.qoq.linear import QoQLinear

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
CONFIGS = [QoQConfig(8), QoQConfig(4, -1), QoQConfig(4, 64)]


@pytest.fixture
def qoq(monkeypatch: pytest.MonkeyPatch) -> Any:
    from hf_longctx.vllm import qoq

    monkeypatch.setattr(qoq, "get_tensor_model_parallel_world_size", lambda: 1)
    return qoq


def quantized(sizes: list[int], config: QoQConfig) -> list[QoQLinear]:
    made = []
    for size in sizes:
        linear = nn.Linear(128, size, False)
        grid = nearest_grid(linear.weight.data, config)
        made.append(QoQLinear.of(linear, grid, grid.codes(linear.weight.data), config))
    return made


def loaded(qoq: Any, parts: list[QoQLinear], config: QoQConfig, shards: list[Any]) -> tuple[Any, nn.Module]:
    layer: Any = nn.Module()
    layer.prefix = "model.layers.0.mlp.gate_up_proj"
    method = qoq.QoQMethod(config)
    sizes = [part.out_features for part in parts]
    method.create_weights(layer, 128, sizes, 128, sum(sizes), torch.float32, weight_loader=None)
    for shard, part in zip(shards, parts, strict=True):
        for name, tensor in part.named_parameters():
            param = getattr(layer, name)
            param.weight_loader(param, tensor.data, *([] if shard is None else [shard]))
    return method, layer


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
@pytest.mark.parametrize(
    ("sizes", "shards"),
    [([96], [None]), ([64, 128], [0, 1]), ([96, 40, 40], ["q", "k", "v"]), ([128, 64, 30], ["q", "k", "v"])],
)
def test_the_product_is_that_of_the_layers(qoq: Any, config: QoQConfig, sizes: list[int], shards: list[Any]) -> None:
    torch.manual_seed(7)
    parts = quantized(sizes, config)
    method, layer = loaded(qoq, parts, config, shards)
    method.process_weights_after_loading(layer)
    x, bias = torch.randn(2, 3, 128), torch.randn(sum(sizes))
    expected: Tensor = torch.cat([part(x) for part in parts], -1)
    assert torch.equal(method.apply(layer, x), expected)
    torch.testing.assert_close(method.apply(layer, x, bias), expected + bias)


def test_what_does_not_fit_or_is_missing_is_named(qoq: Any) -> None:
    config = QoQConfig(8)
    parts = quantized([64, 64], config)
    method, layer = loaded(qoq, parts[:1], config, [None])
    with pytest.raises(ValueError, match=r"QoQ checkpoint: expected torch.uint8 .* for model.layers.0.mlp"):
        layer.weight.weight_loader(layer.weight, torch.zeros(3, 3, dtype=torch.uint8))
    whole = nn.Module()
    whole.prefix = "mlp"  # type: ignore[assignment]
    method.create_weights(whole, 128, [64, 64], 128, 128, torch.float32)
    whole.weight.weight_loader(whole.weight, parts[0].weight.data, 0)  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match="QoQ checkpoint: expected all parts of mlp"):
        method.process_weights_after_loading(whole)


def test_layers_that_vllm_joins_are_quantized_together(qoq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Linear(nn.Module):
        pass

    monkeypatch.setattr(qoq, "LinearBase", Linear)
    config = qoq.QoQ.from_config({"quant_method": "qoq", "wbits": 8, "modules_to_not_convert": ["up_proj", "o_proj"]})
    config.packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"], "qkv_proj": ["q_proj", "k_proj"]}
    assert isinstance(config.get_quant_method(Linear(), "model.layers.0.self_attn.qkv_proj"), qoq.QoQMethod)
    assert not isinstance(config.get_quant_method(Linear(), "model.layers.0.self_attn.o_proj"), qoq.QoQMethod)
    assert config.get_quant_method(nn.Module(), "lm_head") is None
    with pytest.raises(UnsupportedError, match=r"gate_proj, .*up_proj to be quantized together"):
        config.get_quant_method(Linear(), "model.layers.0.mlp.gate_up_proj")


def test_experts_are_refused(qoq: Any) -> None:
    class FusedMoE(nn.Module):
        """As vLLM names it."""

    with pytest.raises(UnsupportedError, match=r"without experts; got model.layers.0.mlp.experts"):
        qoq.QoQ(QoQConfig(8)).get_quant_method(FusedMoE(), "model.layers.0.mlp.experts")


def test_tensor_parallelism_is_refused(qoq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qoq, "get_tensor_model_parallel_world_size", lambda: 2)
    with pytest.raises(UnsupportedError, match="tensor parallelism"):
        qoq.QoQMethod(QoQConfig(8)).create_weights(nn.Module(), 128, [64], 128, 64, torch.float32)
