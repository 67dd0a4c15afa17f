"""Models of a configuration: shapes alone, or random weights; what is none is refused before anything is made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_longctx.configs import build
from hf_longctx.evals.assets import AssetError

LLAMA_8B = Path(__file__).parents[1] / "benchmarks" / "configs" / "llama-3.1-8b.json"
SMALL = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "dtype": "bfloat16",
}  # fmt: skip
CPU = torch.device("cpu")


def written(tmp_path: Path, **facts: Any) -> Path:
    (tmp_path / "small.json").write_text(json.dumps({**SMALL, **facts}))
    return tmp_path / "small.json"


def test_nothing_is_loaded_of_a_model_without_weights() -> None:
    model = build(LLAMA_8B, "auto", torch.device("meta"))
    assert {x.device.type for x in model.parameters()} == {"meta"}
    assert sum(x.numel() for x in model.parameters()) == 8_030_261_248
    assert model.dtype == torch.bfloat16
    assert model.config._name_or_path == "llama-3.1-8b"
    assert not model.training


def test_random_weights_are_those_of_the_seed(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    one, same, other = (
        build(written(tmp_path), dtype, CPU, seed) for dtype, seed in (("auto", 1), ("auto", 1), ("float32", 2))
    )
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.get_input_embeddings().weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0].float(), weights[2])
    assert [x.dtype for x in weights] == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("facts", "dtype", "error", "said"),
    [
        ({}, "int3", ValueError, "dtype: expected auto, float32, bfloat16 or float16; got 'int3'"),
        ({"model_type": "no-such"}, "auto", AssetError, "expected a model's configuration"),
        ({"model_type": "t5"}, "auto", AssetError, "expected a model that writes text; got one of type 't5'"),
        ({"quantization_config": {"quant_method": "x"}}, "auto", ValueError, "got quantized ones"),
    ],
)
def test_what_is_none_is_refused(tmp_path: Path, facts: Any, dtype: str, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        build(written(tmp_path, **facts), dtype, CPU)


def test_the_command_prints_what_plan_tells(call: Any) -> None:
    args = ("plan", "-m", str(LLAMA_8B), "--context", "128k", "--memory", "24GiB")
    code, out, err = call(*args)
    assert code == 0, err
    assert "llama-3.1-8b: 131,072 tokens, 24.00 GiB" in out
    assert 'recommended: patch(model, "lserve")' in out
    code, out, err = call(*args, "--batch", "2", "--json")
    told = json.loads(out)
    assert (code, told["context"], told["batch"]) == (0, 131072, 2)
    assert told["rows"]["dense"]["kv"] == pytest.approx(2 * 16 * 2**30, rel=0.01)
    assert told["rows"]["dense"]["fits"] is False


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--context", "1k,2k"), "--context: expected one length such as 128k; got '1k,2k'"),
        (("--context", "x"), "tokens such as"),
        (("--memory", "much"), "plan: expected memory"),
        (("--batch", "0"), "plan: expected batch"),
        (("-m", "nowhere.json"), "config of 'nowhere.json': expected a file; there is none"),
    ],
)
def test_a_mistake_is_one_line(call: Any, args: tuple[str, ...], said: str) -> None:
    code, _, err = call("plan", *(("-m", str(LLAMA_8B)) if "-m" not in args else ()), *args)
    assert code == 1
    assert said in err
    assert err.count("\n") == 1
