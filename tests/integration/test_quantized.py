"""Quantized weights under `patch`: what a checkpoint says of its keys and values, and that steps stay exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_longctx as lc
from hf_longctx import prompt
from hf_longctx.kernels.types import parts
from hf_longctx.quantize.run import round_all
from hf_longctx.testing.models import tiny_llama

IDS = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))


def quantized(kv_bits: int | None = None) -> Any:
    model = tiny_llama(hidden_size=64, intermediate_size=96, head_dim=16, max_position_embeddings=512)
    round_all(model, lc.QoQConfig(4, 32, kv_bits=kv_bits))
    return model


def bits(model: Any) -> set[int | None]:
    groups = [group for layer in model._hf_longctx.plan.layers for group in layer.groups]
    return {None if group.policy.kv is None else group.policy.kv.bits for group in groups}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {4}),
        ({"method": "dense"}, {4}),
        ({"method": "quest", "token_budget": 64}, {4}),
        ({"prefill": lc.XAttention()}, {4}),
        ({"method": lc.Dense(kv="int8")}, {8}),
        ({"method": "dense", "kv": "native"}, {None}),
        ({"method": "dense", "kv": "int8"}, {8}),
        ({"method": "dense", "train": True}, {None}),
    ],
)
def test_a_checkpoint_says_how_keys_are_stored(asked: dict[str, Any], expected: set[int | None]) -> None:
    assert bits(lc.patch(quantized(4), **asked)) == expected


def test_a_plan_stays_as_it_is() -> None:
    model = quantized(4)
    plan = lc.patch(quantized(), "dense")._hf_longctx.plan
    assert bits(lc.patch(model, plan)) == {None}


def test_a_patched_quantized_model_is_the_same_model() -> None:
    model = quantized()
    with torch.no_grad():
        expected = model(IDS).logits
        lc.patch(model, "dense")
        patched = model(IDS).logits
        lc.unpatch(model)
        assert torch.equal(model(IDS).logits, expected)
    assert (patched - expected).abs().max() <= 0.05 * expected.abs().max()  # a rounding of inputs may go the other way


@pytest.mark.cuda
@pytest.mark.parametrize("kv", ["native", "int4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recorded_steps_give_the_same_tokens(kv: str, dtype: torch.dtype) -> None:
    model, ids = quantized().to("cuda", dtype), IDS.cuda()
    found = []
    for graph in (False, True):
        lc.patch(model, "dense", kv=kv, cuda_graph=graph)
        out = model.generate(ids, max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
        assert (lc.report(model).graphs > 0) is graph  # of the cache, which `out` holds
        found.append(out.sequences)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@torch.no_grad()
def test_rows_of_a_prompt_apart(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers are the same whatever else is computed beside them: so is what the first layer stores."""
    model, ids = lc.patch(quantized(4).to(device, torch.bfloat16), "dense"), IDS.to(device)
    settings: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}
    settings |= {"attention_mask": torch.ones_like(ids), "return_dict_in_generate": True}
    whole = model.generate(ids, **settings)
    monkeypatch.setattr(prompt, "PIECE", ids.shape[1])
    apart = model.generate(ids, **settings)
    for one, other in zip(whole.past_key_values.stacks[0].stores, apart.past_key_values.stacks[0].stores, strict=True):
        for mine, theirs in zip(one[1].memory, other[1].memory, strict=True):
            for x, y in zip(parts(mine), parts(theirs), strict=True):
                assert torch.equal(x[:, :, : ids.shape[1]], y[:, :, : ids.shape[1]])
    largest = float(whole.logits[0].abs().max())
    assert float((apart.logits[0] - whole.logits[0]).abs().max()) <= 0.05 * largest
