"""Adapters on QoQ layers: trained, saved, loaded; the weight stays, and its gradient is that of what it stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import hf_longctx as lc
from hf_longctx.quantize.run import round_all
from hf_longctx.testing.models import tiny_llama
from hf_longctx.weights.qoq.config import QoQConfig
from hf_longctx.weights.qoq.linear import QoQLinear
from hf_longctx.weights.qoq.lora import lora_on_qoq

IDS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))


def quantized() -> Any:
    model = tiny_llama(hidden_size=64, intermediate_size=96, head_dim=16)
    round_all(model, QoQConfig(4, 32))
    return model


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(
        model, lora_on_qoq(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    )


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.train()
    model.zero_grad()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("bias", [False, True])
def test_the_gradient_is_that_of_the_dequantized_weight(bias: bool) -> None:
    linear = nn.Linear(64, 48, bias)
    model = nn.ModuleList([linear])
    made = _round(linear)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    out = made(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    (out * weights).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weights @ made.dequantized(), rtol=1e-5, atol=1e-5)
    if bias:
        assert made.bias is not None
        assert torch.allclose(made.bias.grad, weights.sum(0))
    with torch.no_grad():
        assert torch.allclose(made(x), out, rtol=1e-6, atol=1e-6)
    assert len(model) == 1


def _round(linear: nn.Linear) -> QoQLinear:
    from hf_longctx.weights.qoq.grids import nearest_grid

    config = QoQConfig(4, 32)
    grid = nearest_grid(linear.weight.detach(), config)
    return QoQLinear.of(linear, grid, grid.codes(linear.weight.detach()), config)


def test_training_lowers_the_loss_and_leaves_the_weights(tmp_path: Path) -> None:
    model = adapted(quantized())
    before = {name: x.clone() for name, x in model.state_dict().items() if "lora" not in name}
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=5e-3)
    assert sum(x.requires_grad for x in model.parameters()) == 2 * 14
    losses = []
    for _ in range(12):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items() if "lora" not in name)
    model.eval().save_pretrained(tmp_path)
    base = quantized()
    config = lora_on_qoq(base, LoraConfig.from_pretrained(tmp_path))
    again = PeftModel.from_pretrained(base, tmp_path, config=config).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
        tokens = lc.patch(again, "dense", kv="int4").generate(input_ids=IDS, max_new_tokens=3, do_sample=False)
    assert tokens.shape == (2, 27)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = adapted(quantized())
    plain = gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(model)
    assert plain.keys() == again.keys()
    assert len(plain) == 2 * 14
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_what_cannot_be_is_refused() -> None:
    model = quantized()
    with pytest.raises(ValueError, match="use_dora=True"):
        lora_on_qoq(model, LoraConfig(use_dora=True))
    with pytest.raises(ValueError, match="without a QoQ layer"):
        lora_on_qoq(tiny_llama(), LoraConfig())
    with pytest.raises(lc.UnsupportedError, match="QoQ weights"):
        adapted(model).merge_and_unload()
