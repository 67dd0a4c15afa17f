"""Short cuts of linear layers: which have one, that hooks run, and that nothing changes or stays."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_longctx as lc
from hf_longctx import projections, shortcut

from ..kernels.built import need
from ..methods.cases import DECODERS, named
from .cases import BY_NAME
from .test_generate import NEW, generate, single
from .tiny import Case

STEPS = NEW - 1
LLAMA = BY_NAME["llama"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Short cuts on the CPU, where the definition runs; how often they are taken."""
    need("cpu")
    made: Counter[str] = Counter()
    for name in ("project", "project_gated"):
        own = getattr(projections, name)

        def run(*args: Any, own: Any = own, name: str = name) -> Any:
            made[name] += 1
            return own(*args)

        monkeypatch.setattr(projections, name, run)
    monkeypatch.setattr(shortcut, "DEVICES", {"cpu"})
    return made


def logits(out: Any) -> Tensor:
    return torch.stack(out.logits)


@pytest.mark.parametrize("case", DECODERS, ids=named)
def test_every_family_in_bfloat16(case: Case, calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = lc.patch(case.make().to(torch.bfloat16), "dense")
    got = generate(model, single(case), output_logits=True)
    linears = lc.report(model).linears
    plain = [m for m in model.get_decoder().modules() if type(m) is nn.Linear]
    assert linears == len(plain)
    assert bool(calls["project"]) == bool(plain)
    monkeypatch.setattr(shortcut, "DEVICES", set())
    expected = generate(lc.patch(case.make().to(torch.bfloat16), "dense"), single(case), output_logits=True)
    assert torch.equal(got.sequences, expected.sequences)
    assert torch.equal(logits(got), logits(expected))


def test_launches_of_a_step(calls: Counter[str]) -> None:
    """Of a layer: queries, keys and values; what is said of them; both halves of the gate; and down."""
    model = lc.patch(LLAMA.make().to(torch.bfloat16), "dense")
    generate(model, single(LLAMA))
    layers = model.config.num_hidden_layers
    assert calls == {"project": 3 * layers * STEPS, "project_gated": layers * STEPS}
    assert "linear layers" in str(lc.report(model))


def test_float32_and_many_rows_are_left_alone(calls: Counter[str]) -> None:
    generate(lc.patch(LLAMA.make(), "dense"), single(LLAMA))
    many = {name: x.repeat(5, 1) for name, x in single(LLAMA).items()}
    generate(lc.patch(LLAMA.make().to(torch.bfloat16), "dense"), many)
    assert not calls


def test_hooks_of_layers_run(calls: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those whose results are made together; an MLP with a hook inside computes as ever."""

    def made() -> tuple[Any, Counter[str]]:
        model, seen = LLAMA.make().to(torch.bfloat16), Counter[str]()
        for name, module in model.named_modules():
            if name.endswith(("layers.0.self_attn.k_proj", "layers.0.mlp.up_proj", "layers.1.self_attn.o_proj")):

                def hook(module: Any, args: Any, out: Tensor, name: str = name) -> Tensor:
                    seen[name] += out.shape[1] == 1
                    return out * 1.5

                module.register_forward_hook(hook)
        return lc.patch(model, "dense"), seen

    model, seen = made()
    got = generate(model, single(LLAMA), output_logits=True)
    assert set(seen.values()) == {STEPS}
    assert len(seen) == 3
    assert calls["project_gated"] == (model.config.num_hidden_layers - 1) * STEPS
    monkeypatch.setattr(shortcut, "DEVICES", set())
    assert torch.equal(logits(got), logits(generate(made()[0], single(LLAMA), output_logits=True)))


def test_layers_that_get_different_tensors_are_done_apart(calls: Counter[str]) -> None:
    torch.manual_seed(0)
    layers = tuple(nn.Linear(16, 8).bfloat16() for _ in range(3))
    made = projections.Made(layers)
    first, second = (torch.randn(1, 16).bfloat16() for _ in range(2))
    with torch.no_grad():
        for given in ((first, second, second), (first, first, first), (second, first, second)):
            for number, x in enumerate(given):
                assert torch.equal(made.take(number, x), layers[number](x))
        assert made.apart
        assert made.given is None
        assert not made.waiting


@pytest.mark.parametrize("first", ["deltas", "patch"])
def test_beside_deltas(calls: Counter[str], first: str, llama_delta: Any) -> None:
    base, folder = llama_delta
    wanted = lc.deltas.load(base(), {"law": folder})
    inputs, asked = {"input_ids": torch.arange(3, 12)[None]}, {"adapter_names": ["law"]}
    expected = wanted.generate(**inputs, **asked, max_new_tokens=5, do_sample=False)
    model = base()
    for step in (("deltas", "patch"), ("patch", "deltas"))[first == "patch"]:
        lc.patch(model, "dense") if step == "patch" else lc.deltas.load(model, {"law": folder})
    assert torch.equal(model.generate(**inputs, **asked, max_new_tokens=5, do_sample=False), expected)
    assert bool(calls) == (first == "patch")
    lc.deltas.unload(model)
    lc.unpatch(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.fixture
def llama_delta(tmp_path: Any) -> Any:
    base = LLAMA.make().to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for weight in base.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    base.save_pretrained(tmp_path / "tuned")
    lc.deltas.compress(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
    return lambda: type(base).from_pretrained(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "delta"
