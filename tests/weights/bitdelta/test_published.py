"""`diff.pt` as it was published: its layout word by word, and no code of it is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import hf_longctx as lc
from hf_longctx.weights.bitdelta.bits import restore
from hf_longctx.weights.bitdelta.published import read_published


def publish(pair: Any) -> dict[str, Any]:
    """What the published program writes of a pair, from the description of its format."""
    head = pair.tuned.lm_head
    content: dict[str, Any] = {}
    for name, module in pair.tuned.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            difference = (module.weight - pair.base.get_submodule(name).weight).detach()
            signs = (difference >= 0).T  # [in, out]
            words = torch.zeros(signs.shape[0] // 32, signs.shape[1], dtype=torch.int64)
            for bit in range(32):
                words |= signs[bit::32].long() << bit
            content[f"{name}.mask"] = words.to(torch.int32)
            content[f"{name}.coeff"] = nn.Parameter(difference.abs().mean())
        elif "weight" in module._parameters:
            content[f"{name}.weight"] = module.weight.detach()
    return content


def test_words_written_out_by_hand(tmp_path: Path) -> None:
    """Two words for 64 inputs of two outputs: `[in / 32, out]`, the first input in the lowest bit."""
    mask = torch.tensor([[1, -1], [-(2**31), 2]], dtype=torch.int32)
    torch.save({"a.b.mask": mask, "a.b.coeff": nn.Parameter(torch.tensor(0.5))}, tmp_path / "diff.pt")
    got = restore(read_published(tmp_path / "diff.pt").matrices["a.b.weight"])
    wanted = torch.full((2, 64), -0.5)
    wanted[0, 0] = wanted[0, 63] = wanted[1, 33] = 0.5
    wanted[1, :32] = 0.5
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", ["law", "code"])
def test_a_published_delta_is_loaded_and_converted(llama_pairs: dict[str, Any], tmp_path: Path, name: str) -> None:
    pair = llama_pairs[name]
    torch.save(publish(pair), tmp_path / "diff.pt")
    model = LlamaForCausalLM.from_pretrained(pair.base_folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    lc.deltas.load(model, {"it": tmp_path / "diff.pt"})
    logits = model(ids, adapter_names=["it"]).logits
    torch.testing.assert_close(logits, pair.stands_for()(ids).logits, atol=5e-6, rtol=0)
    lc.deltas.convert(tmp_path / "diff.pt", pair.base_folder, tmp_path / "converted", dense="native")
    converted = LlamaForCausalLM.from_pretrained(tmp_path / "converted")
    assert torch.equal(converted(ids).logits, logits)
    assert converted.config.vocab_size == len(pair.tuned.lm_head.weight)


class Attack:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_a_pickle_is_not_run(llama_pairs: dict[str, Any], tmp_path: Path) -> None:
    trace = tmp_path / "was here"
    torch.save({**publish(llama_pairs["law"]), "x.weight": Attack(trace)}, tmp_path / "diff.pt")
    model = LlamaForCausalLM.from_pretrained(llama_pairs["law"].base_folder)
    with pytest.raises(ValueError, match="code in a file is never run"):
        lc.deltas.load(model, {"it": tmp_path / "diff.pt"})
    assert not trace.exists()
    assert "generate" not in vars(model)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: [1], "got list"),
        (lambda content: {}, "got dict"),
        (lambda content: {**content, "x.mask": torch.zeros(2, 3)}, r"int32 \[inputs / 32, outputs\] and one number"),
        (lambda content: {**content, "x.coeff": torch.ones(())}, "a .mask beside it"),
        (lambda content: {**content, "x.A": torch.ones(2, 2)}, "Differences of low rank are not read"),
        (lambda content: {k: x * 0 if k.endswith("coeff") else x for k, x in content.items()}, "other than zero"),
        (lambda content: {k: x * torch.nan if k.endswith("coeff") else x for k, x in content.items()}, "finite"),
    ],
)
def test_what_is_no_published_delta(llama_pairs: dict[str, Any], tmp_path: Path, change: Any, said: str) -> None:
    torch.save(change(publish(llama_pairs["law"])), tmp_path / "diff.pt")
    with pytest.raises(ValueError, match=said):
        read_published(tmp_path / "diff.pt")


def test_a_file_that_was_cut(llama_pairs: dict[str, Any], tmp_path: Path) -> None:
    torch.save(publish(llama_pairs["law"]), tmp_path / "diff.pt")
    content = (tmp_path / "diff.pt").read_bytes()
    for size in (0, 100, len(content) // 2):
        (tmp_path / "diff.pt").write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"expected a diff\.pt of BitDelta"):
            read_published(tmp_path / "diff.pt")
