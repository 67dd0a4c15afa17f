"""Norms of many tenants where a norm has a short cut: one launch for all rows, and each row is its tenant's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_longctx as lc
from hf_longctx import shortcut
from hf_longctx.kernels import dispatch
from tests.integration.test_shortcuts import counted, norms_of
from tests.kernels.built import need

from . import pairs
from .conftest import Pair
from .test_tenants import TOLERANCE, Watch, batch

FAMILIES = ["llama", "gemma2, scaled embeddings", "qwen3, norms of heads"]
NAMES = ["one", "two", "__base__", "three", "four"]

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


@pytest.fixture(scope="module", params=FAMILIES)
def tenants(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Four fine-tunes of a base, with norms of their own but for the last."""
    root, base = tmp_path_factory.mktemp("norms"), pairs.make(request.param)
    but = {"four": ("norm",)}
    names = [name for name in NAMES if name != "__base__"]
    tuned = {name: pairs.tune(base, seed, but=but.get(name, ())) for seed, name in enumerate(names, 1)}
    return {name: Pair(root, request.param, own, base) for name, own in tuned.items()}


@pytest.fixture
def served(tenants: dict[str, Pair], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The base with tenants on a device, patched before or after they were loaded; short cuts are on that device."""

    def made(device: str, slots: int | None = None, but: str = "", first: bool = False, **knobs: Any) -> Any:
        need(device)
        monkeypatch.setattr(shortcut, "DEVICES", {device})
        folder = next(iter(tenants.values())).base_folder
        model = AutoModelForCausalLM.from_pretrained(folder).to(device)
        if first:
            lc.patch(model, "dense", **knobs)
        lc.deltas.load(model, {name: x.folder for name, x in tenants.items() if name != but}, slots=slots)
        return model if first else lc.patch(model, "dense", **knobs)

    return made


def inputs_on(device: str, rows: int = len(NAMES), seed: int = 0) -> dict[str, torch.Tensor]:
    return {key: x.to(device) for key, x in batch(rows, seed=seed).items()}


@devices
@pytest.mark.parametrize("first", [False, True])
@torch.no_grad()
def test_a_norm_of_all_rows_is_one_launch(served: Any, tenants: dict[str, Pair], first: bool, device: str) -> None:
    model, inputs = served(device, first=first), inputs_on(device)
    with counted() as calls:
        logits = model(**inputs, adapter_names=NAMES).logits
    assert calls["rms_norm"] == norms_of(model) == lc.report(model).norms
    assert dispatch.last_used()["rms_norm"] == ("compiled" if device == "cuda" else "reference")
    for row, name in enumerate(NAMES):
        alone = {key: x[row : row + 1].cpu() for key, x in inputs.items()}
        pair = tenants["one" if name == "__base__" else name]
        merged = copy.deepcopy(pair.base) if name == "__base__" else pair.stands_for()
        merged.set_attn_implementation("eager")  # SDPA has no softcap, and older transformers leave it out there
        wanted = merged(**alone).logits[0]
        real = alone["attention_mask"][0].bool()
        torch.testing.assert_close(logits[row].cpu()[real], wanted[real], atol=8 * TOLERANCE, rtol=0)


@devices
@torch.no_grad()
def test_a_row_of_a_norm_is_what_its_tenants_norm_gives(served: Any, tenants: dict[str, Pair], device: str) -> None:
    model, inputs, seen = served(device), inputs_on(device), []
    for name, module in model.named_modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.register_forward_hook(lambda _, args, out, name=name: seen.append((name, args[0], out)))
    model(**inputs, adapter_names=NAMES)
    assert len(seen) == norms_of(model)
    eps = torch.finfo(torch.float32).eps
    for row, tenant in enumerate(NAMES):
        merged = tenants["one"].base if tenant == "__base__" else tenants[tenant].tuned
        for name, x, out in seen:
            wanted = copy.deepcopy(merged.get_submodule(name)).to(device)(x[row : row + 1])
            torch.testing.assert_close(out[row : row + 1], wanted, rtol=0 if device == "cpu" else 8 * eps, atol=0)


@devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_row_is_what_it_is_among_its_own(served: Any, dtype: torch.dtype, device: str) -> None:
    model, inputs = served(device).to(dtype), inputs_on(device)
    logits = model(**inputs, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        others = inputs_on(device, seed=1)
        for key, x in others.items():
            x[row] = inputs[key][row]
        assert torch.equal(model(**others, adapter_names=[name] * len(NAMES)).logits[row], logits[row]), name


@torch.no_grad()
def test_nothing_changes_by_the_short_cut(served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = served("cpu"), inputs_on("cpu")
    logits = model(**inputs, adapter_names=NAMES).logits
    monkeypatch.setattr(shortcut, "DEVICES", set())
    with counted() as calls:
        assert torch.equal(model(**inputs, adapter_names=NAMES).logits, logits)
    assert not calls


@torch.no_grad()
def test_a_compiler_takes_no_short_cut(served: Any) -> None:
    """Its graph has the base's norms, and what tenants have runs between graphs."""
    torch._dynamo.reset()
    model, inputs = served("cpu"), inputs_on("cpu")
    run = torch.compile(model, backend="eager")
    for names in (NAMES, NAMES[::-1]):
        wanted = model(**inputs, adapter_names=names).logits
        torch.testing.assert_close(run(**inputs, adapter_names=names).logits, wanted, atol=8 * TOLERANCE, rtol=0)


@devices
@torch.no_grad()
def test_tenants_with_norms_take_turns(served: Any, device: str) -> None:
    few, model, inputs = served(device, slots=2), served(device), inputs_on(device, 3)
    for names in (["one", "two", "__base__"], ["three", "four", "four"], ["two", "__base__", "one"], ["three"] * 3):
        wanted = model(**inputs, adapter_names=names).logits
        assert torch.equal(few(**inputs, adapter_names=names).logits, wanted), names
    few.delete_delta("three")
    names = ["four", "four", "one"]
    assert torch.equal(few(**inputs, adapter_names=names).logits, model(**inputs, adapter_names=names).logits)


@devices
@pytest.mark.parametrize("first", [False, True])
def test_tenants_with_norms_come_and_go(served: Any, tenants: dict[str, Pair], first: bool, device: str) -> None:
    """Between steps, which are recorded on a GPU."""
    knobs: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    eager, hot = served(device, cuda_graph=False), served(device, slots=3, but="two", first=first)
    inputs, now, later = inputs_on(device, 3), ["one", "__base__", "three"], ["two", "three", "__base__"]
    wanted = [eager.generate(**inputs, **knobs, adapter_names=names) for names in (now, later)]
    stop = Watch(lambda: (hot.delete_delta("four"), hot.add_delta("two", tenants["two"].folder)), at=5)
    assert torch.equal(hot.generate(**inputs, **knobs, adapter_names=now, stopping_criteria=[stop]), wanted[0])
    assert torch.equal(hot.generate(**inputs, **knobs, adapter_names=later), wanted[1])
