"""Tenants over a base of few bits: the base computes as it does, signs are added to what comes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_longctx as lc
from hf_longctx import integers, shortcut
from hf_longctx.kernels.linear import quantize_norm
from hf_longctx.weights.bitdelta import experts
from hf_longctx.weights.bitdelta.attach import state_of
from hf_longctx.weights.bitdelta.bits import restore
from hf_longctx.weights.bitdelta.format import read
from tests.kernels.built import need

IDS = torch.randint(2, 64, (3, 9), generator=torch.Generator().manual_seed(0))


def quantized(pair: Any) -> Any:
    return LlamaForCausalLM.from_pretrained(pair.base_folder, quantization_config=lc.QoQConfig(wbits=8, group_size=-1))


@torch.no_grad()
def test_rows_over_a_quantized_base(llama_pairs: dict[str, Any]) -> None:
    """Each layer's output is the quantized layer's, plus the product with the difference, as its definition has it."""
    names = ["maths", "__base__", "law"]
    model, bare = quantized(llama_pairs["law"]), quantized(llama_pairs["law"])
    lc.deltas.load(model, {name: llama_pairs[name].folder for name in ("maths", "law")})
    logits = model(IDS, adapter_names=names).logits
    assert torch.equal(logits[1], bare(IDS).logits[1])
    delta = read(llama_pairs["maths"].folder)  # of attention alone
    for name, matrix in delta.matrices.items():
        difference = restore(matrix)
        bare.get_submodule(name.removesuffix(".weight")).register_forward_hook(
            lambda module, args, out, difference=difference: out + args[0] @ difference.T
        )
    torch.testing.assert_close(logits[0], bare(IDS).logits[0], atol=1e-5, rtol=0)
    assert not torch.equal(logits[2], logits[0])


@torch.no_grad()
def test_norms_of_rows_over_a_quantized_base(llama_pairs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's rows alone become 8 bits where they are normed; nothing changes by that."""
    need("cpu")
    found, calls, pair = [], 0, llama_pairs["law"]

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return quantize_norm(*args)

    monkeypatch.setattr(integers, "quantize_norm", counted)
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(shortcut, "DEVICES", devices)
        model = lc.patch(lc.deltas.load(quantized(pair).bfloat16(), {"law": pair.folder}), "dense")
        found.append([model(IDS, adapter_names=names).logits for names in (["law", "__base__", "law"], None)])
    assert calls == 5
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("family", ["qwen3-moe, experts", "mixtral, experts"])
@torch.no_grad()
def test_experts_over_a_quantized_base(make_pair: Any, family: str, device: str) -> None:
    """A tenant's row is nearly that of the fine-tune over the base's own weights; a base row is the base's."""
    pair = make_pair(family)
    config = lc.QoQConfig(wbits=8, group_size=-1)
    model, bare, plain = (
        AutoModelForCausalLM.from_pretrained(pair.base_folder, quantization_config=each).to(device)
        for each in (config, config, None)
    )
    assert type(model.model.layers[0].mlp.experts).__name__ == "QoQExperts"
    lc.deltas.load(model, {"law": pair.folder})
    lc.deltas.load(plain, {"law": pair.folder})
    names, ids = ["law", "__base__", "law"], IDS.to(device)
    logits, expected = (each(ids, adapter_names=names).logits for each in (model, plain))
    alone = bare(ids).logits
    torch.testing.assert_close(logits[1], alone[1], atol=0 if device == "cpu" else 1e-4, rtol=0)
    apart = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert apart.median() < 0.03  # of some tokens another expert is chosen
    tenant = (alone - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert tenant[[0, 2]].median() > 0.15
    with pytest.raises(NotImplementedError, match="merge into the base in 16 bits, then quantize"):
        model.merge_delta("law")


def test_what_can_be_compared_is(llama_pairs: dict[str, Any]) -> None:
    model = quantized(llama_pairs["law"])
    with torch.no_grad():
        model.model.norm.weight[3] += 0.1
    with pytest.raises(ValueError, match=r"other weights in model\.norm\.weight\. Load"):
        lc.deltas.load(model, {"law": llama_pairs["law"].folder})


def test_it_cannot_be_merged(llama_pairs: dict[str, Any]) -> None:
    model = lc.deltas.load(quantized(llama_pairs["law"]), {"law": llama_pairs["law"].folder})
    with pytest.raises(NotImplementedError, match="merge into the base in 16 bits, then quantize"):
        model.merge_delta("law")
    assert model.deltas() == {"law": "device"}


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@torch.no_grad()
def test_experts_at_once_or_one_by_one(make_pair: Any, monkeypatch: pytest.MonkeyPatch, device: str, bits: int) -> None:
    """Where the host is not to wait, rows of all experts are one product; some are of no expert."""
    pair, config = make_pair("mixtral, experts"), lc.QoQConfig(wbits=8, group_size=-1) if bits == 8 else None
    base = AutoModelForCausalLM.from_pretrained(pair.base_folder, quantization_config=config, dtype=torch.bfloat16)
    model = lc.deltas.load(base.to(device), {"law": pair.folder})
    found, made = [], torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, generator=made).to(device, torch.bfloat16)
    scores, ids = torch.rand(8, 4, generator=made).to(device).topk(2)
    for devices in ({device}, set[str]()):
        monkeypatch.setattr(experts, "DEVICES", devices)
        with state_of(model).calling(["law", "__base__"]):
            state_of(model).enter(2)
            found.append(model.model.layers[0].mlp.experts(x, ids, scores).double())
        asks = {hook.asks for hook in state_of(model).hooks.values() if isinstance(hook, experts.Experts)}
        assert asks == {not devices}
    alone = model.model.layers[0].mlp.experts(x, ids, scores).double()
    assert torch.equal(found[0][4:], alone[4:])
    assert (found[0][:4] - alone[:4]).norm() > 0.1 * alone[:4].norm()
    assert (found[0] - found[1]).norm() < 0.01 * found[1].norm()
