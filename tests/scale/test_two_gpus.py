"""Two GPUs: layers on one and the other by `device_map`, and heads on one and the other by tensor parallelism."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import hf_longctx as lc
from hf_longctx.kernels.types import parts
from hf_longctx.patch import state_of

from . import world

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


SPREAD = {
    **dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0"), 0),
    **dict.fromkeys(("model.layers.1", "model.layers.2", "model.norm", "lm_head"), 1),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found: Path = tmp_path_factory.mktemp("two")
    for case in (world.LLAMA, world.ONE_HEAD, *world.OTHERS):
        case.make().save_pretrained(found / case.name)
    return found


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, Any]:
    """What one GPU writes."""
    return world.answers(load(folder / "llama", 0))


def load(folder: Path, where: Any) -> Any:
    model = hf.AutoModelForCausalLM.from_pretrained(folder, device_map=where, dtype=torch.float32)
    return model.eval()


def test_layers_on_two_devices_write_what_one_writes(folder: Path, expected: dict[str, Any]) -> None:
    model = load(folder / "llama", SPREAD)
    lc.patch(model, world.methods("int8")["quest"])
    facts = state_of(model).facts  # type: ignore[union-attr]
    assert set(facts.places) == {torch.device("cuda", 0), torch.device("cuda", 1)}
    ids = world.LLAMA.prompt(world.TOKENS).to(model.device)
    with torch.no_grad():
        cache = model(ids).past_key_values
        model(ids[:, :1], past_key_values=cache)
    for place, stack in zip(facts.places, cache.stacks, strict=True):
        for _, store in stack.stores:
            assert {x.device for stored in store.memory for x in parts(stored)} == {place}
    assert "accelerate moves what goes into a module" in str(lc.report(model).eager)
    lc.unpatch(model)
    assert world.answers(model) == expected


def test_heads_on_two_devices_write_what_one_writes(folder: Path, expected: dict[str, Any]) -> None:
    world.launch(2, "split", folder)
    for rank in range(2):
        found = json.loads((folder / f"found-{rank}.json").read_text())
        assert found["answers"] == expected, rank
        assert found["eager"] == "the model's weights are split over several processes"
