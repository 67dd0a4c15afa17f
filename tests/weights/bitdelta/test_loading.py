"""`from_pretrained` on the folder of a delta, and back with `save_pretrained`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_longctx as lc

from . import pairs

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


@torch.no_grad()
@pytest.mark.parametrize("family", pairs.FAMILIES)
def test_a_delta_loads_as_the_model_that_it_stands_for(make_pair: Callable[..., Any], family: str) -> None:
    pair = make_pair(family)
    wanted = pair.stands_for()(IDS).logits
    model = AutoModelForCausalLM.from_pretrained(pair.folder)
    torch.testing.assert_close(model(IDS).logits, wanted, atol=1e-5, rtol=0)
    many = AutoModelForCausalLM.from_pretrained(pair.base_folder)
    lc.deltas.load(many, {"it": pair.folder})
    mixed = many(IDS, adapter_names=["it", "__base__"]).logits
    torch.testing.assert_close(mixed[0], wanted[0], atol=1e-5, rtol=0)
    if "experts" in family:  # the model's own products are over whichever rows chose an expert
        torch.testing.assert_close(mixed[1], pair.base(IDS).logits[1], atol=1e-5, rtol=0)
    else:
        assert torch.equal(mixed[1], pair.base(IDS).logits[1])


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"vocabulary": 70}, {"dense": "16"}, {"bits": 2, "scales": "row"}])
def test_saved_and_loaded_again_it_is_the_same(
    make_pair: Callable[..., Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    pair = make_pair(**settings)
    model = AutoModelForCausalLM.from_pretrained(pair.folder)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert (tmp_path / "saved" / "model.safetensors").stat().st_size < 1.2 * pair.sizes.nbytes + 20_000
    lc.deltas.load(LlamaForCausalLM.from_pretrained(pair.base_folder), {"it": tmp_path / "saved"})
    assert torch.equal(model.generate(IDS, max_new_tokens=4), again.generate(IDS, max_new_tokens=4))


@torch.no_grad()
@pytest.mark.parametrize("tied", [(True, False), (False, True)], ids=["untied by the fine-tune", "tied by it"])
def test_ties_of_the_fine_tune(tmp_path: Path, tied: tuple[bool, bool]) -> None:
    base = pairs.make("llama", tie_word_embeddings=tied[0])
    tuned = pairs.make("llama", tie_word_embeddings=tied[1])
    moved = pairs.tune(base, 1).state_dict()
    if tied[1]:
        del moved["lm_head.weight"]
    elif tied[0]:
        moved["lm_head.weight"] = moved["lm_head.weight"] * 1.1
    tuned.load_state_dict(moved, strict=False)
    folders = [pairs.save(model, tmp_path / name) for model, name in ((base, "base"), (tuned, "tuned"))]
    lc.deltas.compress(*folders, tmp_path / "delta", dense="native")
    wanted = pairs.stands_for(base, tuned)(IDS).logits
    for model, rows in (
        (AutoModelForCausalLM.from_pretrained(tmp_path / "delta"), None),
        (lc.deltas.load(AutoModelForCausalLM.from_pretrained(folders[0]), {"it": tmp_path / "delta"}), ["it", "it"]),
        (AutoModelForCausalLM.from_pretrained(tmp_path / "delta").dequantize(), None),
    ):
        logits = model(IDS, **({"adapter_names": rows} if rows else {})).logits
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_dequantized_it_is_an_ordinary_model(make_pair: Callable[..., Any], tmp_path: Path) -> None:
    pair = make_pair(vocabulary=70)
    model = AutoModelForCausalLM.from_pretrained(pair.folder).dequantize()
    model.save_pretrained(tmp_path / "dense")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(again(IDS).logits, pair.stands_for()(IDS).logits, atol=1e-5, rtol=0)
    assert "generate" not in vars(model)


def test_a_base_that_is_gone_or_another(make_pair: Callable[..., Any], tmp_path: Path) -> None:
    pair = make_pair()
    moved = tmp_path / "deeper" / "delta"
    shutil.copytree(pair.folder, moved)
    with pytest.raises(FileNotFoundError, match=r"its base; got nothing at ..[\\/]base"):
        AutoModelForCausalLM.from_pretrained(moved)
    pairs.save(pairs.make("llama", seed=5), pair.base_folder)
    with pytest.raises(ValueError, match="the base that it is a difference from; got other weights in"):
        AutoModelForCausalLM.from_pretrained(pair.folder)


def test_a_config_cannot_be_given_for_a_dense_model(make_pair: Callable[..., Any]) -> None:
    from hf_longctx.weights.bitdelta.quantizer import BitDeltaConfig

    with pytest.raises(ValueError, match="A delta is made of two"):
        AutoModelForCausalLM.from_pretrained(make_pair().base_folder, quantization_config=BitDeltaConfig())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("imports", "expected"),
    [
        ("import hf_longctx; from transformers import AutoModelForCausalLM", "generate"),
        ("from transformers import AutoModelForCausalLM; import hf_longctx", "generate"),
        ("from transformers import AutoModelForCausalLM", "refused"),
    ],
)
def test_only_an_import_is_needed_and_without_it_nothing_is_random(
    make_pair: Callable[..., Any], imports: str, expected: str
) -> None:
    code = f"""
{imports}
try:
    model = AutoModelForCausalLM.from_pretrained({str(make_pair().folder)!r})
    print("generate" if "generate" in vars(model) else "random")
except RuntimeError:
    print("refused")
"""
    root = Path(lc.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.splitlines()[-1:] == [expected], done.stderr
