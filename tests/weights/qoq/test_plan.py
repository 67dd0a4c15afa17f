"""`plan` of QoQ checkpoints, from their configuration alone, against what loading them takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

import hf_longctx as lc
from hf_longctx.configs import build
from hf_longctx.outlook import weight_bytes
from hf_longctx.testing.models import tiny_llama

META = torch.device("meta")
FORMS = {"w8a8": (8, -1), "channel": (4, -1), "groups of 64": (4, 64)}


def mixture() -> Any:
    config = hf.Qwen3MoeConfig(vocab_size=64, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, head_dim=32,
                               num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
                               bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    return hf.Qwen3MoeForCausalLM(config)


def saved(form: str, model: Any, folder: Path) -> Path:
    bits, group = FORMS[form]
    model.save_pretrained(folder / "dense")
    config = lc.QoQConfig(bits, group)
    made = hf.AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config)
    made.save_pretrained(folder / "qoq")
    return folder / "qoq"


@pytest.mark.parametrize("make", [lambda: tiny_llama(hidden_size=128, intermediate_size=192, head_dim=32), mixture])
@pytest.mark.parametrize("form", FORMS)
def test_weights_are_those_that_a_loaded_checkpoint_has(form: str, make: Any, tmp_path: Path) -> None:
    folder = saved(form, make(), tmp_path)
    told = lc.plan(build(folder, "auto", META), context=1024, memory="1GiB")
    loaded = hf.AutoModelForCausalLM.from_pretrained(folder)
    on_disk = sum(x.nbytes for file in folder.glob("*.safetensors") for x in load_file(file).values())
    assert told.weights == weight_bytes(loaded) == lc.plan(loaded, context=1024, memory="1GiB").weights
    assert told.weights == pytest.approx(on_disk, rel=0.05)
    dense = lc.plan(build(tmp_path / "dense", "auto", META), context=1024, memory="1GiB")
    assert told.weights < 0.9 * dense.weights
    assert told.rows.keys() == dense.rows.keys()
    assert told.rows["quest"].kv == dense.rows["quest"].kv


def test_the_command_tells_it_from_a_configuration(call: Any, tmp_path: Path) -> None:
    folder = saved("channel", tiny_llama(hidden_size=128, intermediate_size=192, head_dim=32), tmp_path)
    (tmp_path / "alone").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "alone" / "config.json")
    code, out, err = call("plan", "-m", str(tmp_path / "alone"), "--context", "1k", "--memory", "1GiB", "--json")
    assert code == 0, err
    assert json.loads(out)["weights"] == weight_bytes(hf.AutoModelForCausalLM.from_pretrained(folder))


def test_weights_that_cannot_be_told_or_drawn_are_refused(tmp_path: Path) -> None:
    folder = saved("channel", tiny_llama(hidden_size=128, intermediate_size=192, head_dim=32), tmp_path)
    with pytest.raises(ValueError, match=r"expected weights that can be drawn at random; got quantized ones \(qoq\)"):
        build(folder, "auto", torch.device("cpu"))
    facts = json.loads((folder / "config.json").read_text())
    facts["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r"got quantized ones \(gptq\). Load the model and use hf_longctx.plan"):
        build(folder, "auto", META)
