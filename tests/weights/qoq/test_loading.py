"""QoQ models through `from_pretrained` and `save_pretrained`: what is loaded, saved, found, and refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn

import hf_longctx as lc
from hf_longctx.kernels.linear import quantize_tokens
from hf_longctx.testing.models import tiny_llama
from hf_longctx.weights.qoq import linear
from hf_longctx.weights.qoq.config import QoQConfig
from hf_longctx.weights.qoq.linear import QoQLinear

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
FORMS = {"w8": QoQConfig(8), "channel": QoQConfig(4, -1), "g64": QoQConfig(4, 64), "g32": QoQConfig(4, 32)}
IDS = torch.randint(0, 64, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dense")
    tiny_llama(**SIZES, attention_bias=True, tie_word_embeddings=True).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def quantized(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def save(form: str) -> Path:
        if form not in made:
            made[form] = tmp_path_factory.mktemp(form)
            load(dense, quantization_config=FORMS[form]).save_pretrained(made[form], max_shard_size="40KB")
        return made[form]

    return save


def load(path: Path, **kwargs: Any) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(path, **kwargs)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(IDS).logits
    return out


@pytest.mark.parametrize(("form", "most"), [("w8", 0.03), ("channel", 0.3), ("g64", 0.25), ("g32", 0.2)])
def test_on_the_fly_is_the_rounded_weight(dense: Path, form: str, most: float) -> None:
    model, plain = load(dense, quantization_config=FORMS[form]), load(dense)
    for name, module in plain.model.layers.named_modules():
        if isinstance(module, nn.Linear):
            made = model.model.layers.get_submodule(name)
            assert isinstance(made, QoQLinear)
            step = {"w8": 254, "channel": 15, "g64": 15, "g32": 15}[form]
            reach = module.weight.amax(1) - module.weight.amin(1).clamp(max=0)
            bound = (reach + module.weight.abs().amax(1)) / step
            assert ((made.dequantized() - module.weight).abs().amax(1) <= bound).all()
            assert torch.equal(made.bias, module.bias) if module.bias is not None else made.bias is None
    assert model.lm_head.weight is model.model.embed_tokens.weight
    error = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < error < most


@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_that_of_rounded_tokens(dense: Path, form: str) -> None:
    layer = load(dense, quantization_config=FORMS[form]).model.layers[0].self_attn.q_proj
    x = torch.randn(3, 5, 128, generator=torch.Generator().manual_seed(1))
    scale = x.abs().amax(-1, keepdim=True) / 127
    expected = ((x / scale).round() * scale).double() @ layer.dequantized().double().T + layer.bias.double()
    with torch.no_grad():
        got = layer(x)
    assert got.shape == (3, 5, 128)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_layers_share_the_tokens_of_one_input(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load(dense, quantization_config=FORMS["g64"]).model.layers[0].self_attn
    count = 0

    def counted(x: torch.Tensor) -> Any:
        nonlocal count
        count += 1
        return quantize_tokens(x)

    monkeypatch.setattr(linear, "quantize_tokens", counted)
    x = torch.randn(1, 3, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = [layer(x) for layer in (made.q_proj, made.k_proj, made.v_proj)]
        assert count == 1
        again = [layer(x) for layer in (made.q_proj, made.k_proj, made.v_proj)]
        assert count == 2  # a layer that comes again begins another pass
        x.mul_(-1)
        other = [layer(x) for layer in (made.k_proj, made.v_proj)]
        assert count == 3  # written to
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.allclose(other[0] - made.k_proj.bias, made.k_proj.bias - first[1], atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", [{}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}])
def test_a_reload_is_bit_equal(dense: Path, quantized: Any, form: str, how: dict[str, Any]) -> None:
    path = quantized(form)
    assert len(list(path.glob("*.safetensors"))) > 3
    first, again = load(dense, quantization_config=FORMS[form]), load(path, **how)
    assert again.config.quantization_config.to_dict() == FORMS[form].to_dict()
    before, after = first.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert torch.equal(logits(first), logits(again))
    assert not any(x.requires_grad for name, x in again.named_parameters() if ".weight" in name and "proj" in name)


def test_scales_stay_float32(quantized: Any) -> None:
    model = load(quantized("channel"), dtype=torch.bfloat16)
    layer = model.model.layers[0].mlp.down_proj
    assert layer.weight_scale.dtype == layer.weight_shift.dtype == torch.float32
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
    kept = layer.weight_scale.clone()
    model.to(torch.float16)
    assert torch.equal(layer.weight_scale, kept)
    assert model.model.norm.weight.dtype == torch.float16
    assert logits(model).dtype == torch.float16


def test_disk_offload(quantized: Any, tmp_path: Path) -> None:
    path = quantized("g64")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    model = load(path, device_map={**places, "model.rotary_emb": "cpu", "lm_head": "cpu"}, offload_folder=tmp_path)
    assert model.model.layers[1].mlp.down_proj.weight.is_meta
    assert torch.equal(logits(model), logits(load(path)))


def test_dequantize_gives_linear_layers_of_the_same_values(quantized: Any) -> None:
    model = load(quantized("g64"))
    expected = {n: m.dequantized() for n, m in model.named_modules() if isinstance(m, QoQLinear)}
    plain = model.dequantize()
    assert not hasattr(plain.config, "quantization_config")
    assert all(torch.equal(plain.get_submodule(name).weight, x) for name, x in expected.items())
    assert isinstance(plain.model.layers[0].self_attn.q_proj, nn.Linear)
    assert plain.model.layers[0].self_attn.q_proj.bias is not None
    assert (logits(plain) - logits(load(quantized("g64")))).norm() < 0.03 * logits(plain).norm()


@pytest.mark.parametrize("first", ["hf_longctx", "transformers.quantizers"])
def test_a_checkpoint_finds_its_quantizer_whatever_comes_first(quantized: Any, first: str) -> None:
    code = (
        f"import {first}, hf_longctx, sys\n"
        f"assert {first!r} != 'hf_longctx' or not {{'torch', 'transformers'}} & sys.modules.keys()\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(quantized('w8'))!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "QoQLinear"


def test_without_this_package_a_checkpoint_is_refused(quantized: Any) -> None:
    code = (
        f"from transformers import AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained({str(quantized('w8'))!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "size mismatch" in done.stderr or "mismatched" in done.stderr.lower()


def _family(name: str, **facts: Any) -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": False}
    return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**{**sizes, **heads, **facts}))


@pytest.mark.parametrize(
    ("name", "facts", "count"),
    [("Qwen2", {}, 14), ("Qwen3", {"head_dim": 32}, 14), ("Phi3", {}, 8), ("Gemma2", {"head_dim": 32}, 14)],
)
def test_families(name: str, facts: dict[str, Any], count: int, tmp_path: Path) -> None:
    plain = _family(name, **facts)
    with torch.no_grad():
        for key, x in plain.named_parameters():
            if key.endswith("bias") or "norm" in key:
                x.normal_(0.5, 0.2)
    plain.eval().save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", quantization_config=QoQConfig(8))
    assert sum(isinstance(x, QoQLinear) for x in model.modules()) == count
    error = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert error < 0.05
    model.save_pretrained(tmp_path / "out")
    again = load(tmp_path / "out")
    assert torch.equal(logits(again), logits(model))
    out = lc.patch(again, "dense", kv="int4").generate(IDS, max_new_tokens=3, do_sample=False)
    assert out.shape == (2, 23)


def test_experts_are_left_out(tmp_path: Path) -> None:
    facts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    plain = _family("Qwen3Moe", **facts).eval()
    plain.save_pretrained(tmp_path / "dense")
    config = QoQConfig(8, modules_to_not_convert=["experts"])
    model = load(tmp_path / "dense", quantization_config=config)
    assert sum(isinstance(x, QoQLinear) for x in model.modules()) >= 8
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(model))


def test_groups_that_do_not_fit_are_refused(tmp_path: Path, dense: Path) -> None:
    with pytest.raises(
        ValueError, match=r"multiples of 128; got 192 in model\.layers\.0\.mlp\.down_proj.*group_size=64"
    ):
        load(dense, quantization_config=QoQConfig())
    tiny_llama(intermediate_size=40).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"multiples of 32; got 40 .*modules_to_not_convert="):
        load(tmp_path, quantization_config=QoQConfig(8))
    model = load(tmp_path, quantization_config=QoQConfig(8, modules_to_not_convert=["down_proj"]))
    assert isinstance(model.model.layers[1].mlp.down_proj, nn.Linear)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"wbits": 3}, "wbits 4 or 8; got 3"),
        ({"group_size": 100}, "group_size -1 or 32 or 64 or 128 with 4 bits; got 100"),
        ({"wbits": 8, "group_size": 128}, "group_size -1 with 8 bits; got 128"),
        ({"kv_bits": 2}, "kv_bits 4, 8 or None; got 2"),
        ({"layout": 99}, "layout 1; got 99"),
        ({"new": 1}, "no other keys; got 'new'"),
    ],
)
def test_a_configuration_is_checked(facts: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        QoQConfig(**facts)


def _damaged(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(source, target)
    tensors = {name: x for file in target.glob("*.safetensors") for name, x in load_file(file).items()}
    for file in [*target.glob("*.safetensors"), *target.glob("*.index.json")]:
        file.unlink()
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_damaged_checkpoints_are_refused_by_tensor(quantized: Any, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    source = quantized("g64")
    with pytest.raises(ValueError, match=f"got none for {name}_scale"):
        load(_damaged(source, tmp_path / "a", lambda tensors: tensors.pop(f"{name}_scale")))
    with pytest.raises(ValueError, match=f"got none for {name}"):
        load(_damaged(source, tmp_path / "b", lambda tensors: tensors.pop(name)))
    with pytest.raises((RuntimeError, ValueError), match=f"(?i)mismatch|for {name}"):
        load(_damaged(source, tmp_path / "c", lambda tensors: tensors.update({name: tensors[name][:, :-1].clone()})))
    other = _damaged(source, tmp_path / "d", lambda tensors: None)
    told = json.loads((other / "config.json").read_text())
    told["quantization_config"]["group_size"] = -1
    (other / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match="weight_shift"):
        load(other)


def test_weights_that_are_not_finite_are_refused(dense: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    broken = _damaged(dense, tmp_path / "nan", lambda tensors: tensors[name][0].fill_(torch.nan))
    with pytest.raises((ValueError, RuntimeError), match=r"finite|conversion"):
        load(broken, quantization_config=QoQConfig(8))
