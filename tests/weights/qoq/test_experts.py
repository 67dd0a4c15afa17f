"""Models with experts: what is rounded, loaded, saved and computed, against the definition and the model itself."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hf_longctx as lc
from hf_longctx.errors import UnsupportedError
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.weights.qoq import split
from hf_longctx.weights.qoq.config import QoQConfig
from hf_longctx.weights.qoq.experts import QoQExperts, put, rounded
from hf_longctx.weights.qoq.linear import QoQLinear
from hf_longctx.weights.qoq.lora import lora_on_qoq

SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": None},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen3Moe": {"moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 3, "head_dim": 16},
    "Olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "Qwen2Moe": {
        **{"moe_intermediate_size": 32, "num_experts": 6, "num_experts_per_tok": 2},
        "shared_expert_intermediate_size": 64,
    },
    "DeepseekV3": {
        **{"moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
        **{"first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16},
        **{"v_head_dim": 16, "qk_nope_head_dim": 16, "n_shared_experts": 1, "num_key_value_heads": 4},
    },
}
G32 = QoQConfig(4, 32)
FORMS = {"w8": QoQConfig(8), "channel": QoQConfig(4, -1), "g32": G32}
IDS = torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def dense(name: str, **facts: Any) -> Any:
    """A random model, whose routers are sure of themselves."""
    config = getattr(hf, f"{name}Config")(**{**SIZES, **FAMILIES[name], **facts})
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    made = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for x in model.parameters():
            if x.dim() > 1:
                x.copy_(torch.randn(x.shape, generator=made) * 1.5 / x.shape[-1] ** 0.5)
    return model


def load(path: Path, **kwargs: Any) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(path, **kwargs)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    out: Tensor = model(IDS).logits
    return out


def module(form: str, experts: int = 5, width: int = 64, inner: int = 96) -> tuple[Any, QoQExperts]:
    """Random experts of Mixtral, and the same quantized."""
    model = dense("Mixtral", num_local_experts=experts, hidden_size=width, intermediate_size=inner)
    old = model.model.layers[0].mlp.experts
    made = QoQExperts(old, FORMS[form])
    put(made.gate_up, rounded(old.gate_up_proj, FORMS[form]))
    put(made.down, rounded(old.down_proj, FORMS[form]))
    return old, made


def routed(tokens: int, experts: int, top: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of 64 channels, their experts, and the weights of those."""
    made = torch.Generator().manual_seed(tokens)
    scores, ids = torch.rand(tokens, experts, generator=made).topk(top)
    return torch.randn(tokens, 64, generator=made), ids, scores / scores.sum(-1, keepdim=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_rounded_saved_and_read_again(name: str, tmp_path: Path) -> None:
    plain = dense(name)
    plain.save_pretrained(tmp_path / "plain")
    first = load(tmp_path / "plain", quantization_config=G32)
    mixture = first.model.layers[1].mlp
    assert isinstance(mixture.experts, QoQExperts)
    assert not any(x.dim() > 1 and x.is_floating_point() and x.requires_grad for x in mixture.experts.parameters())
    still = dict(plain.model.layers[1].mlp.named_parameters())
    for key, x in mixture.named_parameters():
        if key.startswith(("gate.", "shared_expert_gate.")):
            assert torch.equal(x, still[key])
    others = [x for key, x in mixture.named_modules() if isinstance(x, nn.Linear)]
    assert all(x.out_features == 1 for x in others)
    assert isinstance(first.model.layers[1].self_attn.o_proj, QoQLinear)

    first.save_pretrained(tmp_path / "quantized", max_shard_size="20KB")
    assert len(list((tmp_path / "quantized").glob("*.safetensors"))) > 3
    for how in ({}, {"device_map": "auto"}):
        again = load(tmp_path / "quantized", **how)
        before, after = first.state_dict(), again.state_dict()
        assert before.keys() == after.keys()
        assert [key for key in before if not torch.equal(before[key], after[key])] == []
        assert torch.equal(logits(first), logits(again))
    out = again.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False)
    assert torch.equal(out, first.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, do_sample=False))
    back = again.dequantize()
    assert {key: x.shape for key, x in back.state_dict().items()} == {k: x.shape for k, x in plain.state_dict().items()}
    share = [(back.state_dict()[key] - x).norm() / x.norm() for key, x in plain.state_dict().items() if x.dim() > 1]
    assert max(share) < 0.12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_product_is_that_of_rounded_tokens(form: str, tokens: int) -> None:
    _, made = module(form)
    x, ids, weights = routed(tokens, 5)

    def rounded_tokens(y: Tensor) -> Tensor:
        scale = y.abs().amax(-1, keepdim=True) / 127
        return (y / scale).round() * scale

    expected = torch.zeros(tokens, 64, dtype=torch.float64)
    for t in range(tokens):
        for i in range(2):
            up, down = (part.dequantized(int(ids[t, i])).double() for part in (made.gate_up, made.down))
            gate, other = (rounded_tokens(x[t : t + 1]).double() @ up.T).chunk(2, 1)
            inner = rounded_tokens((nn.functional.silu(gate) * other).float())
            expected[t] += (inner.double() @ down.T)[0] * weights[t, i]
    with torch.no_grad():
        got = made(x, ids, weights)
    assert (got - expected).abs().max() <= 2e-2 * expected.abs().max()  # of a token rounded the other way
    assert (got - expected).norm() <= 2e-3 * expected.norm()


def test_a_token_gets_the_same_in_any_company() -> None:
    _, made = module("g32")
    x, ids, weights = routed(33, 5)
    ids[3, 1] = 5  # of no expert
    with torch.no_grad():
        whole = made(x, ids, weights)
        alone = torch.cat([made(x[t : t + 1], ids[t : t + 1], weights[t : t + 1]) for t in range(33)])
        weights[3, 1] = torch.nan
        assert torch.equal(made(x, ids, weights), whole)
    assert torch.equal(alone, whole)


def test_left_padding_changes_nothing(tmp_path: Path) -> None:
    dense("Mixtral").save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=QoQConfig(8))
    mask = torch.ones_like(IDS)
    ids = IDS.clone()
    ids[0, :5], mask[0, :5] = 0, 0
    together = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)[:, 12:]
    for row, start in ((0, 5), (1, 0)):
        alone = ids[row : row + 1, start:]
        got = model.generate(alone, attention_mask=torch.ones_like(alone), max_new_tokens=6, do_sample=False)
        assert torch.equal(got[0, 12 - start :], together[row])


def test_gradients_are_those_of_the_dequantized_weights() -> None:
    _, made = module("w8")
    plain: Any = made.plain(torch.float32)
    plain.config._experts_implementation = "eager"
    x, ids, weights = routed(9, 5)
    found = []
    for experts in (made, plain):
        a, b = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = experts(a, ids, b)
        out.backward(torch.ones_like(out))
        found.append((out.detach(), a.grad, b.grad))
    with torch.no_grad():
        assert torch.allclose(found[0][0], made(x, ids, weights), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(*found, strict=True):
        assert (mine - theirs).norm() <= 0.03 * theirs.norm()
    assert all(p.grad is None for p in made.parameters())


def test_adapters_train_beside_experts_and_not_on_them(tmp_path: Path) -> None:
    dense("Mixtral").save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=G32)
    for name in ("mlp.experts.gate_up_proj", "experts.down.weight"):
        config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=[name])
        with pytest.raises(ValueError, match=rf"got target_parameters with {name}"):
            lora_on_qoq(model, config)
    lora = get_peft_model(model, lora_on_qoq(model, LoraConfig(r=4, target_modules="all-linear")))
    lora(IDS, labels=IDS).loss.backward()
    grads = [x.grad for name, x in lora.named_parameters() if "lora_B" in name]
    assert len(grads) == 8
    assert all(grad is not None and bool(grad.abs().max() > 0) for grad in grads)


def test_scales_stay_float32() -> None:
    _, made = module("channel")
    kept = made.gate_up.weight_scale.clone()
    made.to(torch.bfloat16)
    assert torch.equal(made.gate_up.weight_scale, kept)
    assert made.down.weight_shift is not None
    assert made.down.weight_shift.dtype == torch.float32


def test_what_is_refused(tmp_path: Path) -> None:
    dense("Mixtral").save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"multiples of 64; got 96 in .*experts.* Use group_size=32"):
        load(tmp_path / "plain", quantization_config=QoQConfig(4, 64))
    left = load(tmp_path / "plain", quantization_config=QoQConfig(4, 32, ["experts"]))
    assert not isinstance(left.model.layers[0].mlp.experts, QoQExperts)
    assert isinstance(left.model.layers[0].self_attn.q_proj, QoQLinear)
    load(tmp_path / "plain", quantization_config=G32).save_pretrained(tmp_path / "quantized")
    file = tmp_path / "quantized" / "model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("layers.1.block_sparse_moe.experts.down.weight_groups"))
    save_file({k: x for k, x in tensors.items() if k != key}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"got none for model.layers.1.mlp.experts.down.weight_groups"):
        load(tmp_path / "quantized")
    facts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
    hf.GptOssForCausalLM(hf.GptOssConfig(**{**SIZES, **facts})).save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedError, match=r"or as those of Mixtral; got model.layers.0.mlp.experts.gate_up_proj"):
        load(tmp_path / "other", quantization_config=G32)


def test_processes_that_share_experts_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would cut their tensors, and add up what each process makes of its part."""
    dense("Mixtral").save_pretrained(tmp_path)
    monkeypatch.setattr(split, "mesh_of", lambda model: SimpleNamespace(size=lambda: 2))
    with pytest.raises(UnsupportedError, match=r"with experts: .* got one over 2 processes"):
        load(tmp_path, quantization_config=G32)


def test_experts_on_the_disk(tmp_path: Path) -> None:
    dense("Mixtral").save_pretrained(tmp_path / "plain")
    load(tmp_path / "plain", quantization_config=G32).save_pretrained(tmp_path / "quantized")
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = load(tmp_path / "quantized", device_map=places, offload_folder=tmp_path / "disk")
    assert model.model.layers[1].mlp.experts.down.weight.is_meta
    assert torch.equal(logits(model), logits(load(tmp_path / "quantized")))


@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe"])
def test_a_patched_model(name: str, tmp_path: Path) -> None:
    dense(name).save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=QoQConfig(8))
    how = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(IDS, **how)
    assert torch.equal(lc.patch(model, "dense").generate(IDS, **how), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tokens", [1, 16, 700])
def test_on_cuda_it_is_the_definition(form: str, tokens: int) -> None:
    _, made = module(form)
    made.cuda()
    x, ids, weights = (y.cuda() for y in routed(tokens, 5))
    with torch.no_grad():
        got = made(x.bfloat16(), ids, weights)
        with use_backend("reference"):
            expected = made(x.bfloat16(), ids, weights)
    assert torch.equal(got, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["Mixtral", "Qwen2Moe"])
def test_steps_on_cuda_are_recorded(name: str, tmp_path: Path) -> None:
    """A graph of a decode step serves tokens that choose other experts: the very logits of a step that is none."""
    dense(name, num_attention_heads=2, num_key_value_heads=1).save_pretrained(tmp_path)
    model = load(tmp_path, quantization_config=G32, dtype=torch.bfloat16, device_map={"": 0})
    found = []
    for on in (True, False):
        lc.patch(model, "dense", cuda_graph=on)
        how = {"max_new_tokens": 12, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(IDS.cuda(), attention_mask=torch.ones_like(IDS).cuda(), **how)
        found.append(torch.stack(out.logits, 1))
        assert (lc.report(model).graphs > 0) is on, lc.report(model).eager
        lc.unpatch(model)
    assert torch.equal(*found)
