from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import hf_longctx as lc
from hf_longctx.weights.qoq import split
from hf_longctx.weights.qoq.config import QoQConfig
from hf_longctx.weights.qoq.linear import QoQLinear

from ..weights.bitdelta import pairs
from . import quantized, world


class Parts(nn.Module):
    """A quantized layer cut by columns, as the definition has it: tokens are rounded where their channels are."""

    def __init__(self, whole: QoQLinear, ranks: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(cut(whole, "rowwise", rank, ranks) for rank in range(ranks))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = sum(part(y) for part, y in zip(self.parts, x.chunk(len(self.parts), -1), strict=True))
        return out


def cut(whole: QoQLinear, style: str, rank: int, ranks: int) -> QoQLinear:
    part = copy.deepcopy(whole)
    split._cut(part, style, rank, ranks)
    return part


def dense(folder: Path) -> Path:
    """A model whose channels fit; 96 of the feed-forward network do not, in halves of groups of 64."""
    sizes: dict[str, Any] = {"vocab_size": world.VOCABULARY, "hidden_size": 128, "intermediate_size": 192}
    shape = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **shape, attention_bias=False, eos_token_id=None))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(60 / weight.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **more: Any) -> Any:
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()


def save_tenants(folder: Path) -> Any:
    """Three fine-tunes of a base with biases, and one whose channels do not fit; what rows of the three write."""
    base = pairs.make("qwen2, biases, tied", intermediate_size=128)
    pairs.save(base, folder / "base")
    kinds: dict[str, Any] = {"a": {}, "b": {"bits": 2, "scales": "row"}, "c": {"scales": "32"}}
    for seed, (name, settings) in enumerate(kinds.items()):
        tuned = pairs.tune(base, seed + 1, vocabulary=70 if name == "b" else None)
        pairs.save(tuned, folder / f"tuned-{name}")
        out = folder / f"tenant-{name}"
        lc.deltas.compress(folder / "base", folder / f"tuned-{name}", out, dense="native", **settings)
    odd = pairs.make("llama")
    pairs.save(odd, folder / "odd-base")
    pairs.save(pairs.tune(odd, 1), folder / "odd-tuned")
    lc.deltas.compress(folder / "odd-base", folder / "odd-tuned", folder / "odd", dense="native")
    whole = {path.name: path for path in sorted(folder.glob("tenant-*"))}
    return quantized.rows_of(load(folder / "base"), whole)


def test_two_processes_share_quantized_layers_and_the_signs_of_tenants(tmp_path: Path) -> None:
    source = dense(tmp_path / "dense")
    load(source, quantization_config=QoQConfig(4, 64)).save_pretrained(tmp_path / "g64")
    expected: dict[str, Any] = {}
    for form, config in quantized.FORMS.items():
        model = load(source, quantization_config=config)
        model.save_pretrained(tmp_path / form)
        held = sum(x.nbytes for n, x in model.named_parameters() if ".self_attn." in n or ".mlp." in n)
        for name, module in list(model.named_modules()):
            if name.endswith(("o_proj", "down_proj")):
                model.set_submodule(name, Parts(module, 2))
        expected[form] = quantized.asked(model), held
    tenants = save_tenants(tmp_path)
    world.launch(2, "quantized", tmp_path)
    for rank in range(2):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        torch.testing.assert_close(torch.tensor(found["tenants"][0]), torch.tensor(tenants[0]), rtol=1e-4, atol=1e-4)
        assert found["tenants"][1] == tenants[1]
        assert "merge_delta: expected a model that is whole in this process" in found["merged"]
        assert "mlp.down_proj: expected multiples of 32 inputs, and whole groups, on each of 2 p" in found["odd"]
        for form in quantized.FORMS:
            (logits, tokens), held = expected[form]
            torch.testing.assert_close(torch.tensor(found[form][0]), torch.tensor(logits), rtol=1e-4, atol=1e-4)
            assert found[form][1] == tokens
            assert found[f"{form} fresh"]
            assert found[f"{form} bytes"] < 0.75 * held  # not half: panels of 64 rows and 128 columns are filled up
        assert found["saved"].startswith("UnsupportedError: save_pretrained: expected a QoQ model that is whole")
        assert "mlp.down_proj in multiples of 64 on each of 2 processes; got 192" in found["too fine"]


@pytest.mark.parametrize("config", [QoQConfig(8), QoQConfig(4, -1), QoQConfig(4, 32)])
def test_parts_are_the_whole(config: QoQConfig, tmp_path: Path) -> None:
    model = load(dense(tmp_path), quantization_config=config)
    for name in ("self_attn.k_proj", "mlp.down_proj"):
        whole = model.model.layers[0].get_submodule(name)
        for style, dim in (("colwise", 0), ("rowwise", 1)):
            parts = [cut(whole, style, rank, 2) for rank in range(2)]
            assert torch.equal(torch.cat([part.dequantized() for part in parts], dim), whole.dequantized())


def test_layers_of_a_kind_are_split_all_or_none(tmp_path: Path) -> None:
    config = QoQConfig(8, modules_to_not_convert=["layers.1.mlp.up_proj"])
    model = load(dense(tmp_path), quantization_config=config)
    assert model._tp_plan["model.layers.*.mlp.up_proj"] == "colwise"  # put back
    made = split.Split.take(model, model.hf_quantizer._chosen)
    assert "model.layers.*.mlp.up_proj" not in model._tp_plan

    class Mesh:
        ndim = 1

        def size(self) -> int:
            return 2

    model._tp_size, model._device_mesh = 2, Mesh()
    with pytest.raises(NotImplementedError, match=r"got model\.layers\.1\.mlp\.up_proj left out"):
        made.apply(model)
    made = split.Split({"model.layers.0.mlp.up_proj": "packed_colwise"})
    with pytest.raises(NotImplementedError, match=r"by rows or columns; got 'packed_colwise' for model\.layers\.0"):
        made.apply(model)
    with pytest.raises(NotImplementedError, match="dequantize: expected a QoQ model that is whole"):
        model.dequantize()
