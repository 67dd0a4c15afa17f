"""Calibration of models with experts: each by the tokens that reach it, and what becomes of those that none does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from hf_longctx.errors import UnsupportedError
from hf_longctx.quantize import run as room
from hf_longctx.quantize.saving import save_model
from hf_longctx.weights.qoq.calibrate import layer as rounds
from hf_longctx.weights.qoq.calibrate.flow import Seen
from hf_longctx.weights.qoq.calibrate.recipe import Recipe
from hf_longctx.weights.qoq.calibrate.rounding import fit, gptq, output_error
from hf_longctx.weights.qoq.config import QoQConfig
from hf_longctx.weights.qoq.experts import QoQExperts, rounded
from hf_longctx.weights.qoq.grids import nearest_grid
from hf_longctx.weights.qoq.linear import QoQLinear

from .test_run import IDS, TASK, error, family, logits

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Qwen3Moe": {"moe_intermediate_size": 64, "num_experts": 3, "num_experts_per_tok": 2, "mlp_only_layers": [0]},
    "Qwen2Moe": {
        **{"moe_intermediate_size": 64, "num_experts": 3, "num_experts_per_tok": 2},
        "shared_expert_intermediate_size": 64,
    },
    "Olmoe": {"num_experts": 3, "num_experts_per_tok": 2},
}
RECIPES = {
    "Olmoe": Recipe(QoQConfig(group_size=64), smooth_attention=0.0),  # its norms are over all heads
    "Qwen2Moe": Recipe(QoQConfig(group_size=64), rotate=False),
}


def quantize(model: Any, recipe: Recipe, out: Path, ids: Tensor = IDS, resume: bool = False) -> dict[str, Any]:
    return room.run(model, ids, recipe, TASK, out, "cpu", resume, None)


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_lower_the_error_of_experts(name: str, tmp_path: Path) -> None:
    recipe = RECIPES.get(name, Recipe(QoQConfig(group_size=64)))
    model, plain = (family(name, **SIZES, **FAMILIES[name]) for _ in range(2))
    expected = logits(model)
    room.round_all(plain, recipe.config)
    report = quantize(model, recipe, tmp_path)
    assert error(model, expected) < 0.9 * error(plain, expected)
    linears = [each for layer in report["layers"] for each in layer["linears"] if ".experts." in each["name"]]
    assert len(linears) == (6 if name == "Qwen3Moe" else 12)
    assert all(each["kept"] <= each["clipped"] * 1.001 <= each["eased"] * 1.02 for each in linears)
    assert sum(each["kept"] for each in linears) < 0.8 * sum(each["nearest"] for each in linears)
    assert "mlp.experts.*.gate_up" in [str(x) for x in room.table(report).columns[0].cells]
    mixture = model.model.layers[1].mlp
    assert isinstance(mixture.experts, QoQExperts)
    assert not isinstance(mixture.gate, QoQLinear)
    save_model(model, None, tmp_path, report)
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_an_expert_that_no_token_reaches(tmp_path: Path) -> None:
    """It is rounded to the nearest, and named; in eight bits all is nearly the model."""
    facts = {**SIZES, "num_local_experts": 12, "num_experts_per_tok": 1}
    model = family("Mixtral", **facts)
    old, chosen = model.model.layers[0].mlp, set[int]()
    handle = old.gate.register_forward_hook(lambda module, args, out: chosen.update(out[2].flatten().tolist()))
    ids = IDS[:2, :10]
    with torch.no_grad():
        expected = model(ids).logits
    handle.remove()
    assert 0 < len(chosen) < 12
    weights = old.experts.gate_up_proj.data.clone()
    recipe = Recipe(QoQConfig(8), rotate=False)
    report = quantize(model, recipe, tmp_path, ids)
    missed = [number for number in range(12) if number not in chosen]
    assert report["layers"][0]["unreached"] == [f"experts.{number}" for number in missed]
    plain = rounded(weights, recipe.config)["weight"]
    kept = model.model.layers[0].mlp.experts.gate_up.weight
    assert all(torch.equal(kept[number], plain[number]) for number in missed)
    with torch.no_grad():
        assert (model(ids).logits - expected).norm() < 0.2 * expected.norm()
    said = room.unreached({"layers": report["layers"][:1]})
    assert f"reached {len(missed)} experts" in said
    assert f"model.layers.0.experts.{missed[0]}" in said
    assert room.unreached({"layers": [{"layer": "model.layers.0"}]}) == ""


class _StoppedError(Exception):
    pass


def test_a_resumed_run_with_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(Recipe(QoQConfig(group_size=64)), rotate=False, gptq=False, clip=False)
    whole, part, again = (family("Qwen2Moe", **SIZES, **FAMILIES["Qwen2Moe"]) for _ in range(3))
    told = quantize(whole, recipe, tmp_path / "whole")
    make, count = room._make, iter(range(9))

    def once(*args: Any) -> Any:
        if next(count):
            raise _StoppedError
        return make(*args)

    with monkeypatch.context() as patched:
        patched.setattr(room, "_make", once)
        with pytest.raises(_StoppedError):
            quantize(part, recipe, tmp_path / "part")
    assert quantize(again, recipe, tmp_path / "part", resume=True)["layers"] == told["layers"]
    first, second = whole.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_another_expert_for_a_token_is_no_other_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are as likely, and rounding decides; but a layer that computes something else is refused."""
    check, seen = rounds._check_equal, []

    def turned(block: Any, got: Tensor, expected: Tensor) -> None:
        got = got.clone()
        got.view(-1, got.shape[-1])[7] *= 1.2
        seen.append(block.name)
        check(block, got, expected)
        with pytest.raises(UnsupportedError, match="to compute the same"):
            check(block, got * 1.01, expected)

    monkeypatch.setattr(rounds, "_check_equal", turned)
    quantize(family("Mixtral", **SIZES, **FAMILIES["Mixtral"]), replace(Recipe(QoQConfig(8)), gptq=False), tmp_path)
    assert len(seen) == 2


def test_a_few_tokens_say_little_of_an_expert() -> None:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 64, generator=made) * torch.rand(64, generator=made).mul(3).exp()
    weight = torch.randn(32, 64, generator=made)
    config, apart = QoQConfig(4, 64), []
    every = x.T @ x / len(x)
    for shrunk in (True, False):
        seen = Seen(torch.zeros(64, 64), torch.zeros(64))
        seen.add(x[:4])
        grid = fit(weight, config, moments := rounds._of_expert(seen) if shrunk else seen.moments)
        change = grid.values(gptq(weight, grid, moments)) - weight
        apart.append(float(output_error(change, every).sum()))
    plain = nearest_grid(weight, config)
    nearest = float(output_error(plain.values(plain.codes(weight)) - weight, every).sum())
    assert apart[0] < 1.05 * nearest < apart[1]
