"""A whole quantization of tiny models: what it computes, saves, resumes and refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import hf_longctx as lc
from hf_longctx.quantize import run as room
from hf_longctx.quantize.saving import WORK, save_model
from hf_longctx.testing.models import tiny_llama
from hf_longctx.weights.qoq.calibrate.recipe import Recipe
from hf_longctx.weights.qoq.config import QoQConfig
from hf_longctx.weights.qoq.linear import QoQLinear

IDS = torch.randint(0, 64, (12, 40), generator=torch.Generator().manual_seed(0))
TASK = room.Task(12, 40, 4, "drawn", "")
G64 = Recipe(QoQConfig(group_size=64))
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "tie_word_embeddings": True},
    "Mistral": {"sliding_window": 16},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "Qwen3": {},
    "Phi3": {},
    "Gemma": {},
    "Granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
}


def family(name: str, **facts: Any) -> Any:
    sizes = {"vocab_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, **SIZES}
    ends = {"pad_token_id": 0, "tie_word_embeddings": False, "eos_token_id": None}
    model = getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**{**sizes, **ends, **facts})).eval()
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, x in model.named_parameters():
            noise = torch.randn(x.shape, generator=made)
            if x.dim() == 1:
                x.copy_(noise * 0.3 + (0.0 if name == "Gemma" or "bias" in key else 1.0))
                continue
            x.copy_(noise * (1.0 if "embed" in key else 1.5 / x.shape[-1] ** 0.5))
            if "k_proj" in key or "qkv" in key or "up_proj" in key:  # channels of different sizes
                x *= torch.rand(x.shape[-2], 1, generator=made).mul(2).exp()
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(IDS).logits
    return out


def error(model: Any, expected: torch.Tensor) -> float:
    return float((logits(model) - expected).norm() / expected.norm())


def quantize(model: Any, recipe: Recipe, out: Path, resume: bool = False) -> dict[str, Any]:
    return room.run(model, IDS, recipe, TASK, out, "cpu", resume, None)


@pytest.mark.parametrize("name", FAMILIES)
def test_eight_bits_with_every_step_are_nearly_the_model(name: str, tmp_path: Path) -> None:
    model, plain = family(name, **FAMILIES[name]), family(name, **FAMILIES[name])
    expected = logits(model)
    room.round_all(plain, QoQConfig(8))
    quantize(model, Recipe(QoQConfig(8)), tmp_path)
    assert error(model, expected) < min(0.2, 1.2 * error(plain, expected))
    assert model.model.norm.weight.eq(0.0 if name == "Gemma" else 1.0).all()
    save_model(model, None, tmp_path, None)
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert not (tmp_path / WORK).exists()


@pytest.mark.parametrize(
    ("name", "config"),
    [("Llama", QoQConfig(group_size=64)), ("Llama", QoQConfig(group_size=-1)), ("Phi3", QoQConfig(group_size=64))],
)
def test_steps_lower_the_error(name: str, config: QoQConfig, tmp_path: Path) -> None:
    model, plain = family(name, **FAMILIES[name]), family(name, **FAMILIES[name])
    expected = logits(model)
    room.round_all(plain, config)
    report = quantize(model, Recipe(config), tmp_path)
    assert error(model, expected) < 0.75 * error(plain, expected)
    linears = [linear for layer in report["layers"] for linear in layer["linears"]]
    assert len(linears) == (8 if name == "Phi3" else 14)
    assert all(each["kept"] <= each["clipped"] * 1.001 <= each["eased"] * 1.02 for each in linears)
    assert sum(each["kept"] for each in linears) < 0.8 * sum(each["nearest"] for each in linears)
    assert all(0 < layer["output"] < 1 for layer in report["layers"])
    json.dumps(report)


@pytest.mark.parametrize(
    "change",
    [
        {"rotate": False},
        {"rotate": False, "smooth_attention": 0.0},
        {"smooth_inputs": None},
        {"reorder": False, "clip": False},
        {"gptq": False},
    ],
)
def test_each_step_can_be_left_out(change: dict[str, Any], tmp_path: Path) -> None:
    model, plain = family("Llama", **FAMILIES["Llama"]), family("Llama", **FAMILIES["Llama"])
    expected = logits(model)
    room.round_all(plain, QoQConfig(8))
    quantize(model, replace(G64, config=QoQConfig(8), **change), tmp_path)
    assert error(model, expected) < min(0.2, 1.2 * error(plain, expected))
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied is ("rotate" in change) is model.config.tie_word_embeddings


class _StoppedError(Exception):
    pass


def test_a_resumed_run_is_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = family("Llama").to(torch.bfloat16)
    told = quantize(whole, G64, tmp_path / "whole")

    def stop(*args: Any) -> Any:
        raise _StoppedError

    with monkeypatch.context() as patched:
        make, count = room._make, iter(range(9))
        patched.setattr(room, "_make", lambda *args: stop() if next(count) == 1 else make(*args))
        with pytest.raises(_StoppedError):
            quantize(family("Llama").to(torch.bfloat16), G64, tmp_path / "part")
    with pytest.raises(ValueError, match="no unfinished run"):
        quantize(family("Llama").to(torch.bfloat16), G64, tmp_path / "part")
    with pytest.raises(ValueError, match="made with gptq=False; got True"):
        quantize(family("Llama").to(torch.bfloat16), replace(G64, gptq=False), tmp_path / "part", resume=True)
    again = family("Llama").to(torch.bfloat16)
    said = quantize(again, G64, tmp_path / "part", resume=True)
    assert said["layers"] == told["layers"]
    first, second = whole.state_dict(), again.state_dict()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert isinstance(again.model.layers[0].mlp.up_proj, QoQLinear)


@pytest.mark.parametrize(
    ("name", "facts", "said"),
    [
        ("Gemma2", {}, "got also pre_feedforward_layernorm, in 'gemma2'"),
        ("GPTNeoX", {"num_key_value_heads": 4}, "input_layernorm|q_proj|qkv_proj|mlp|post"),
        ("StableLm", {}, "RMSNorm to rotate"),
        (
            "DeepseekV3",
            {"num_key_value_heads": 4, "first_k_dense_replace": 2, "head_dim": None},
            "q_proj or qkv_proj in",
        ),
    ],
)
def test_families_that_are_built_otherwise_are_refused(
    name: str, facts: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(lc.UnsupportedError, match=said):
        quantize(family(name, **facts), G64, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_change_that_shows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_rotary", lambda model, width: 8)  # not the pairs that positions rotate
    with pytest.raises(lc.UnsupportedError, match=r"layers\.0 to compute the same.*--smooth-attention 0"):
        quantize(family("Llama"), replace(G64, rotate=False), tmp_path)


def test_inputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = family("Llama")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0] = torch.nan
    with pytest.raises(RuntimeError, match=r"finite inputs of 'down' in model\.layers\.1"):
        quantize(model, replace(G64, rotate=False), tmp_path)
    assert len(list((tmp_path / WORK).iterdir())) == 1


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    model = tiny_llama(**SIZES)
    room.round_all(model, QoQConfig(8))
    with pytest.raises(ValueError, match="got a quantized model"):
        quantize(model, G64, tmp_path)


def test_a_failed_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama(**SIZES)
    room.round_all(model, QoQConfig(8))
    save_model(model, None, tmp_path, {"layers": []})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path) -> None:
        (path / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space"):
        save_model(model, None, tmp_path, None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_texts(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    content = "one two three four five six seven " * 40
    ids = room.samples(tokenizer, content, 3, 16)
    assert ids.shape == (3, 16)
    assert not torch.equal(ids[0], ids[1])
    assert len(room.samples(tokenizer, content, None, 16)) > 3
    with pytest.raises(ValueError, match=r"a text of 9999 x .*Pass a longer --calib"):
        room.samples(tokenizer, content, 9999, 16)
    with pytest.raises(ValueError, match="2 tokens or more"):
        room.samples(tokenizer, content, 3, 1)
