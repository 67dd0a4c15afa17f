"""Scales that are taught, and adapters of low rank."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

import hf_longctx as lc
from hf_longctx.weights.bitdelta.attach import install, remove
from hf_longctx.weights.bitdelta.bits import Matrix
from hf_longctx.weights.bitdelta.distil import Lessons, _trained, distil
from hf_longctx.weights.bitdelta.experts import Experts
from hf_longctx.weights.bitdelta.format import read
from hf_longctx.weights.bitdelta.writing import update

from . import pairs

IDS = torch.randint(2, 64, (400,), generator=torch.Generator().manual_seed(0))


def distance(delta: Any, pair: Any) -> float:
    """Mean squared distance of logits from the fine-tune's, on a text of its own."""
    model = lc.deltas.load(type(pair.base).from_pretrained(pair.base_folder), {"it": delta})
    ids = torch.randint(2, 64, (4, 32), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((model(ids, adapter_names=["it"]).logits - pair.tuned(ids).logits).square().mean())


def halved(delta: Any) -> Any:
    """A delta with scales that are wrong: of random differences the mean magnitudes are the best already."""
    return replace(delta, matrices={name: Matrix(m.bits, m.scales / 2) for name, m in delta.matrices.items()})


@pytest.mark.parametrize("train", ["scales", "all"])
def test_taught_scales_are_nearer_and_nothing_else_has_changed(make_pair: Callable[..., Any], train: str) -> None:
    pair = make_pair(but=("layers.1.mlp",))
    before, base = halved(read(pair.folder)), LlamaForCausalLM.from_pretrained(pair.base_folder)
    state = {name: x.clone() for name, x in base.state_dict().items()}
    losses: list[float] = []
    lessons = Lessons(steps=60, batch=2, tokens=16, train=train, rate=1e-3)
    after = distil(base, pair.tuned, before, IDS, lessons, lambda step, loss: losses.append(loss))
    assert len(losses) == 60
    assert distance(after, pair) < 0.8 * distance(before, pair)
    assert distance(after, pair) < 1.02 * distance(pair.folder, pair)
    assert all(torch.equal(x, base.state_dict()[name]) for name, x in state.items())
    assert all(x.requires_grad for x in base.parameters())
    assert "generate" not in vars(base)
    for name, matrix in after.matrices.items():
        assert torch.equal(matrix.bits, before.matrices[name].bits)
        assert not torch.equal(matrix.scales, before.matrices[name].scales)
    same = [torch.equal(x, before.dense[name]) for name, x in after.dense.items() if name in before.dense]
    assert all(same) if train == "scales" else not any(same)
    assert (len(after.dense) > len(before.dense)) == (train == "all")
    again = distil(base, pair.tuned, before, IDS, lessons)
    assert all(torch.equal(m.scales, again.matrices[name].scales) for name, m in after.matrices.items())


def test_gradients_go_through_the_signs_to_the_layers_before(make_pair: Callable[..., Any]) -> None:
    """Against finite differences, in float64: the first layer's scales, all other deltas above them."""
    pair = make_pair()
    base = LlamaForCausalLM.from_pretrained(pair.base_folder, dtype=torch.float64).requires_grad_(False)
    state = install(base, {"it": read(pair.folder)}, 1)
    state.active = "it"
    scales = list(_trained(state, "scales"))
    ids = IDS[:24].reshape(2, 12)

    def loss() -> torch.Tensor:
        return base(ids).logits.square().mean()

    loss().backward()
    for which in (0, 3, 13):
        with torch.no_grad():
            step = 1e-2 * float(scales[which])  # norms are in float32: less is lost in their rounding
            scales[which] += step
            high = loss()
            scales[which] -= 2 * step
            low = loss()
            scales[which] += step
        torch.testing.assert_close(float(scales[which].grad), float((high - low) / (2 * step)), rtol=2e-3, atol=1e-6)
    remove(base)


def test_the_files_have_it_afterwards(make_pair: Callable[..., Any], tmp_path: Path) -> None:
    pair = make_pair(dense="int8")
    other = shutil.copytree(pair.folder, pair.folder.parent / "other")
    base = LlamaForCausalLM.from_pretrained(pair.base_folder)
    taught = distil(base, pair.tuned, read(other), IDS, Lessons(steps=2, tokens=16, train="all"))
    update(other, taught)
    again = read(other)
    assert again.tensors().keys() == taught.tensors().keys()
    assert all(torch.equal(x, again.tensors()[name]) for name, x in taught.tensors().items())
    assert distance(other, pair) == distance(taught, pair)


def test_from_the_command_line(call: Any, folder: Path, tmp_path: Path) -> None:
    """On the tiny model with a tokenizer: `folder` is its base."""
    base = LlamaForCausalLM.from_pretrained(folder)
    tuned = shutil.copytree(folder, tmp_path / "tuned")
    pairs.tune(base, 1).save_pretrained(tuned)
    wanted = ("--base", str(folder), "--finetuned", str(tuned), "-o", str(tmp_path / "out"))
    how = ("--device", "cpu", "--dtype", "float32", "--steps", "3")
    text = tmp_path / "text.txt"
    text.write_text("To be or not to be, that is the question. " * 200)
    code, out, err = call("delta", "compress", *wanted, "--calibrate", str(text), *how)
    assert code == 0, err
    assert "Delta: " in out
    before = read(tmp_path / "out")
    code, _, err = call("delta", "distil", str(tmp_path / "out"), "--finetuned", str(tuned), "--text", str(text), *how)
    assert code == 0, err
    after = read(tmp_path / "out")
    assert any(not torch.equal(m.scales, before.matrices[name].scales) for name, m in after.matrices.items())
    code, out, err = call("delta", "export-lora", str(tmp_path / "out"), "-o", str(tmp_path / "lora"), "--rank", "2")
    assert code == 0, err
    assert "rank 2: loses" in out
    code, _, err = call("delta", "distil", str(tmp_path / "out"), "--finetuned", str(tuned), "--train", "none", *how)
    assert code == 1
    assert "one of scales, all" in err


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"steps": 0}, "steps of at least 1"),
        ({"tokens": 1}, "tokens of at least 2"),
        ({"rate": 0.0}, "a rate above 0"),
        ({"train": "signs"}, "one of scales, all"),
    ],
)
def test_lessons_that_are_none(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Lessons(**knobs)


EXPERTS = ("qwen3-moe, experts", "mixtral, experts")


@pytest.mark.parametrize(("family", "scales", "train"), [(EXPERTS[0], "matrix", "scales"), (EXPERTS[1], "32", "all")])
def test_experts_are_taught(make_pair: Callable[..., Any], family: str, scales: str, train: str) -> None:
    pair = make_pair(family, scales=scales)
    before, base = halved(read(pair.folder)), type(pair.base).from_pretrained(pair.base_folder)
    lessons = Lessons(steps=40, batch=2, tokens=16, train=train, rate=1e-3)
    after = distil(base, pair.tuned, before, IDS, lessons)
    assert distance(after, pair) < 0.9 * distance(before, pair)
    experts = [name for name in after.matrices if ".experts." in name]
    assert experts
    assert after.matrices.keys() == before.matrices.keys()
    for name, matrix in after.matrices.items():
        assert torch.equal(matrix.bits, before.matrices[name].bits)
        assert matrix.scales.shape == before.matrices[name].scales.shape
    assert any(not torch.equal(after.matrices[name].scales, before.matrices[name].scales) for name in experts)
    assert torch.equal(base.get_input_embeddings().weight, pair.base.get_input_embeddings().weight)


@pytest.mark.parametrize("scales", ["matrix", "row"])
def test_gradients_of_experts(make_pair: Callable[..., Any], scales: str) -> None:
    """Of the scale of one matrix or row, against finite differences: all places that hold it move together."""
    pair = make_pair(EXPERTS[0], scales=scales)
    how = {"dtype": torch.float64, "experts_implementation": "eager"}  # their products of groups know no float64
    base = type(pair.base).from_pretrained(pair.base_folder, **how).requires_grad_(False)
    state = install(base, {"it": read(pair.folder)}, 1)
    state.active = "it"
    assert any(x.ndim == 5 for x in _trained(state, "scales"))
    hook = next(hook for hook in state.hooks.values() if isinstance(hook, Experts))
    weights = torch.randn(2, 12, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ids = IDS[:24].reshape(2, 12)

    def loss() -> torch.Tensor:
        return (base(ids).logits * weights).mean()

    loss().backward()
    for name, x in hook.scales.items():
        rows = 1 if scales == "row" else x.shape[3] // (2 if name == "gate_up_proj" else 1)
        first, grads = x[1, 0, 0, :rows], x.grad[1, 0, 0, :rows]
        assert torch.equal(grads, grads[:1].expand_as(grads))
        with torch.no_grad():
            step = 2e-2 * float(first[0, 0])
            first += step
            high = loss()
            first -= 2 * step
            low = loss()
            first += step
        torch.testing.assert_close(float(grads[0, 0]), float((high - low) / (2 * step)), rtol=5e-3, atol=1e-7)
    remove(base)


def test_what_cannot_be_taught(make_pair: Callable[..., Any]) -> None:
    pair = make_pair()
    base = type(pair.base).from_pretrained(pair.base_folder)
    with pytest.raises(ValueError, match="a text of at least 128 tokens; got 20"):
        distil(base, pair.tuned, read(pair.folder), IDS[:20], Lessons(steps=1))


def test_an_adapter_of_full_rank_is_the_delta_and_a_small_one_says_what_it_loses(
    make_pair: Callable[..., Any], tmp_path: Path
) -> None:
    pair = make_pair(but=("embed", "norm", "lm_head"))
    ids = IDS[:20].reshape(2, 10)
    wanted = lc.deltas.load(LlamaForCausalLM.from_pretrained(pair.base_folder), {"it": pair.folder})
    with torch.no_grad():
        logits = wanted(ids, adapter_names=["it"]).logits
        whole = lc.deltas.export_lora(pair.folder, 64, tmp_path / "whole")
        assert whole.error < 1e-5
        assert whole.left_out == ()
        adapted = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(pair.base_folder), tmp_path / "whole")
        assert float((adapted(ids).logits - logits).abs().max()) < 0.05  # factors are in bfloat16
    small = lc.deltas.export_lora(pair.folder, 4, tmp_path / "small")
    assert 0.5 < small.error < 1
    assert small.nbytes < whole.nbytes / 10
    assert "rank 4: loses" in str(small)
    assert lc.deltas.export_lora(pair.folder, 8, tmp_path / "more").error < small.error
    with pytest.raises(ValueError, match="a rank of at least 1"):
        lc.deltas.export_lora(pair.folder, 0, tmp_path / "none")
    assert not (tmp_path / "none").exists()
