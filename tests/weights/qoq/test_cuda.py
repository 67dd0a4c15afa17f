"""QoQ on a GPU: the same products as on the CPU, loaded there, calibrated there, trained there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_longctx.quantize.run import round_all
from hf_longctx.testing.models import tiny_llama
from hf_longctx.weights.qoq.calibrate.recipe import Recipe
from hf_longctx.weights.qoq.config import QoQConfig
from hf_longctx.weights.qoq.grids import nearest_grid
from hf_longctx.weights.qoq.linear import QoQLinear
from hf_longctx.weights.qoq.lora import lora_on_qoq

from ...quantize.test_run import IDS as TEXTS
from ...quantize.test_run import TASK, error, family, logits, quantize, room
from .test_loading import FORMS, IDS, load

pytestmark = [pytest.mark.cuda]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_products_are_those_of_the_cpu(form: str, dtype: torch.dtype, tokens: int) -> None:
    made = torch.Generator().manual_seed(0)
    linear = nn.Linear(576, 200)
    weight = linear.weight.detach()
    grid = nearest_grid(weight, FORMS[form])
    layer = QoQLinear.of(linear, grid, grid.codes(weight), FORMS[form])
    x = torch.randn(2, tokens, 576, generator=made).to(dtype)
    with torch.no_grad():
        expected = layer(x).float()
        got = layer.cuda()(x.cuda()).float().cpu()
    assert (got - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()


def test_a_recorded_graph_reads_what_its_input_holds_then() -> None:
    linear = nn.Linear(128, 64)
    weight = linear.weight.detach()
    grid = nearest_grid(weight, FORMS["g64"])
    layers = [QoQLinear.of(linear, grid, grid.codes(weight), FORMS["g64"]).cuda() for _ in range(2)]
    x, other = torch.randn(2, 4, 128, generator=torch.Generator().manual_seed(0)).cuda().unbind()
    x = x.clone()
    with torch.no_grad():
        for layer in layers:
            layer(x)
        for _ in range(2):  # recorded twice, over the same input
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = [layer(x) for layer in layers]
        x.copy_(other)
        graph.replay()
        assert all(torch.equal(each, layer(other)) for each, layer in zip(out, layers, strict=True))


def test_a_checkpoint_loads_on_the_gpu(tmp_path: Path) -> None:
    tiny_llama(hidden_size=128, intermediate_size=192, head_dim=32).save_pretrained(tmp_path / "dense")
    there = load(tmp_path / "dense", quantization_config=FORMS["g64"], device_map={"": 0})
    there.save_pretrained(tmp_path / "out")
    again, cpu = load(tmp_path / "out", device_map="cuda"), load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(there(IDS.cuda()).logits, again(IDS.cuda()).logits)
        assert (again(IDS.cuda()).logits.cpu() - cpu(IDS).logits).norm() < 0.02 * cpu(IDS).logits.norm()


def test_a_calibration_on_the_gpu_is_as_good(tmp_path: Path) -> None:
    recipe = Recipe(QoQConfig(group_size=64))
    here, there = family("Llama"), family("Llama")
    expected = logits(here)
    quantize(here, recipe, tmp_path / "cpu")
    room.run(there, TEXTS, recipe, TASK, tmp_path / "cuda", "cuda", False, None)
    assert next(there.parameters()).device.type == "cpu"
    assert error(there, expected) < 1.2 * error(here, expected)


def test_a_calibration_of_experts_on_the_gpu_is_as_good(tmp_path: Path) -> None:
    """In float32, where products of experts are torch's."""
    facts = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 3, "num_experts_per_tok": 2}
    recipe = Recipe(QoQConfig(group_size=64))
    here, there = (family("Mixtral", **facts, head_dim=16) for _ in range(2))
    expected = logits(here)
    quantize(here, recipe, tmp_path / "cpu")
    room.run(there, TEXTS, recipe, TASK, tmp_path / "cuda", "cuda", False, None)
    assert error(there, expected) < 1.2 * error(here, expected)


def test_adapters_train(tmp_path: Path) -> None:
    model: Any = tiny_llama(hidden_size=64, intermediate_size=96, head_dim=16)
    round_all(model, QoQConfig(4, 32))
    model.to("cuda", torch.bfloat16)
    torch.manual_seed(0)
    lora = get_peft_model(model, lora_on_qoq(model, LoraConfig(r=4, target_modules="all-linear")))
    optimizer = torch.optim.AdamW([x for x in lora.parameters() if x.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        loss = lora(IDS.cuda(), labels=IDS.cuda(), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
