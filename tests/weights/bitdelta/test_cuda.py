"""Tenants on a GPU: the same rows, whoever else is there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_longctx as lc
from hf_longctx.kernels import dispatch
from hf_longctx.weights.bitdelta.attach import state_of
from hf_longctx.weights.bitdelta.format import read

from .test_tenants import NAMES, TOLERANCE, Watch, batch, dense

pytestmark = pytest.mark.cuda


def on_gpu(pairs: dict[str, Any], dtype: torch.dtype, slots: int | None = None) -> Any:
    base = LlamaForCausalLM.from_pretrained(next(iter(pairs.values())).base_folder, dtype=dtype).cuda()
    return lc.deltas.load(base, {name: pair.folder for name, pair in pairs.items()}, slots=slots)


def there(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: x.cuda() for key, x in inputs.items()}


@torch.no_grad()
@pytest.mark.parametrize("length", [9, 100])
def test_each_row_has_the_logits_of_its_merged_model(llama_pairs: dict[str, Any], length: int) -> None:
    inputs, model = there(batch(len(NAMES), length)), on_gpu(llama_pairs, torch.float32)
    logits = model(**inputs, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        alone = {key: x[row : row + 1] for key, x in inputs.items()}
        wanted = copy.deepcopy(dense(llama_pairs, name)).cuda()(**alone).logits[0]
        real = alone["attention_mask"][0].bool()
        torch.testing.assert_close(logits[row, real, : wanted.shape[-1]], wanted[real], atol=4 * TOLERANCE, rtol=0)
        assert (logits[row, :, wanted.shape[-1] :] == -torch.inf).all()


@torch.no_grad()
@pytest.mark.parametrize("length", [9, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_the_others(llama_pairs: dict[str, Any], dtype: torch.dtype, length: int) -> None:
    model, first, second = on_gpu(llama_pairs, dtype), there(batch(4, length)), there(batch(4, length, seed=1))
    second["input_ids"][0] = first["input_ids"][0]
    one = model(**first, adapter_names=["law", "code", "__base__", "maths"]).logits[0]
    for names in (["law"] * 4, ["law", "poems", "maths", "code"], ["law", "__base__", "__base__", "__base__"]):
        assert torch.equal(one[:, :64], model(**second, adapter_names=names).logits[0, :, :64]), names


@torch.no_grad()
@pytest.mark.parametrize("length", [3, 9, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_who_is_on_the_device(
    wide_pairs: dict[str, Any], eighth_pair: Any, dtype: torch.dtype, length: int
) -> None:
    """Few rows, many, and between; whose tenant has one bit, two, tables in int8."""
    everyone = {**wide_pairs, "eighth": eighth_pair}
    model, first, second = on_gpu(everyone, dtype), there(batch(4, length)), there(batch(4, length, seed=1))
    second["input_ids"][0] = first["input_ids"][0]
    for name in ("law", "poems", "eighth"):
        wanted = on_gpu({name: everyone[name]}, dtype)(**first, adapter_names=[name] * 4).logits[0]
        for others in ([name] * 3, ["poems", "maths", "eighth"], ["__base__", "law", "code"]):
            found = model(**second, adapter_names=[name, *others]).logits[0, :, : wanted.shape[-1]]
            assert torch.equal(found, wanted), (name, others)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_heads_of_all_tenants_are_one_product(wide_pairs: dict[str, Any], eighth_pair: Any, dtype: torch.dtype) -> None:
    everyone = {**wide_pairs, "eighth": eighth_pair}
    model, names = on_gpu(everyone, dtype), ["law", "__base__", "eighth", "code"]
    hidden = torch.randn(4, 1, 128, device="cuda", dtype=dtype)
    with state_of(model).calling(names):
        logits = model.lm_head(hidden)[:, 0].double()
    assert dispatch.last_used()["linear_of_rows"] == "compiled"
    assert logits.shape == (4, 70)
    for row, name in enumerate(names):
        own = (
            model.lm_head.weight if name == "__base__" else read(everyone[name].folder).weight("lm_head.weight").cuda()
        )
        weight = own if name == "eighth" else own.to(dtype)  # codes are multiplied as they are
        wanted = weight.double() @ hidden[row, 0].double()
        torch.testing.assert_close(logits[row, : len(weight)], wanted, rtol=torch.finfo(dtype).eps, atol=1e-5)
        assert (logits[row, len(weight) :] == -torch.inf).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recorded_steps_give_the_same(wide_pairs: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = there(batch(4, length=16))
    knobs: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    eager, patched = (on_gpu(wide_pairs, dtype, slots=3) for _ in range(2))  # the same tenants are there
    lc.patch(eager, "dense", cuda_graph=False)
    lc.patch(patched, "dense")
    for names in (["law", "code", "__base__", "maths"], ["poems", "law", "law", "__base__"], None, ["maths"] * 4):
        asked = {} if names is None else {"adapter_names": names}
        out, wanted = (model.generate(**inputs, **asked, **knobs) for model in (patched, eager))
        assert torch.equal(out.sequences, wanted.sequences), names
        report = lc.report(patched)
        assert report.eager is None, report.eager
        assert report.graphs, names


@torch.no_grad()
@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize(
    ("family", "inner"), [("qwen3-moe, experts", "moe_intermediate_size"), ("mixtral, experts", "intermediate_size")]
)
def test_recorded_steps_of_experts(make_pair: Any, family: str, inner: str, bits: int) -> None:
    pair, inputs = make_pair(family, facts={"hidden_size": 128, "head_dim": 32, inner: 128}), there(batch(4, length=16))
    knobs: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "return_dict_in_generate": True}
    config = None if bits == 16 else lc.QoQConfig(4, 32)
    models = []
    for graph in (False, True):
        how = {"quantization_config": config, "dtype": torch.bfloat16, "device_map": {"": 0}}
        base = AutoModelForCausalLM.from_pretrained(pair.base_folder, **how)
        models.append(lc.patch(lc.deltas.load(base, {"law": pair.folder}), "dense", cuda_graph=graph))
    for names in (["law", "__base__", "__base__", "law"], ["law"] * 4, None):
        asked = {} if names is None else {"adapter_names": names}
        wanted, out = (model.generate(**inputs, **asked, **knobs) for model in models)
        assert torch.equal(out.sequences, wanted.sequences), names
        assert lc.report(models[1]).graphs, (names, lc.report(models[1]).eager)


@torch.no_grad()
def test_a_patched_model_in_float32_says_the_same(llama_pairs: dict[str, Any]) -> None:
    """The library has no deltas in float32 on a GPU; Triton has."""
    inputs = there(batch(2, length=16))
    knobs: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "adapter_names": ["law", "__base__"]}
    plain, patched = on_gpu(llama_pairs, torch.float32), on_gpu(llama_pairs, torch.float32)
    lc.patch(patched, "dense")
    assert torch.equal(patched.generate(**inputs, **knobs), plain.generate(**inputs, **knobs))
    assert dispatch.last_used()["delta_linear"] == "triton"


@torch.no_grad()
def test_tenants_come_and_go_while_others_generate(llama_pairs: dict[str, Any]) -> None:
    inputs = there(batch(2))
    knobs: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "adapter_names": ["law", "__base__"]}
    wanted = on_gpu(llama_pairs, torch.float32).generate(**inputs, **knobs)
    hot = LlamaForCausalLM.from_pretrained(llama_pairs["law"].base_folder).cuda()
    lc.deltas.load(hot, {name: llama_pairs[name].folder for name in ("law", "maths")}, slots=3)
    stop = Watch(lambda: (hot.add_delta("poems", llama_pairs["poems"].folder), hot.delete_delta("maths")), at=6)
    assert torch.equal(hot.generate(**inputs, **knobs, stopping_criteria=[stop]), wanted)
    assert set(hot.deltas()) == {"law", "poems"}
