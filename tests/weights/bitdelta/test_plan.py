"""`plan` of deltas: a folder from its files alone, and a base with tenants, against what is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

import hf_longctx as lc
from hf_longctx.configs import build
from hf_longctx.weights.bitdelta.attach import state_of

META = torch.device("meta")


def held(model: Any) -> int:
    """Bytes of all storages of a model and its tenants."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    tensors += [x for hook in state_of(model).hooks.values() for x in hook.buffers()]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("family", ["llama", "qwen2, biases, tied", "qwen3-moe, experts"])
@pytest.mark.parametrize("settings", [{}, {"vocabulary": 70}, {"bits": 2, "scales": "row"}])
def test_a_folder_takes_what_its_base_and_one_tenant_take(
    make_pair: Callable[..., Any], family: str, settings: dict[str, Any]
) -> None:
    pair = make_pair(family, **settings)
    told = lc.plan(build(pair.folder, "auto", META), context=1024, memory="1GiB")
    loaded = hf.AutoModelForCausalLM.from_pretrained(pair.folder)
    assert told.weights == pytest.approx(held(loaded), rel=0.05)
    assert told.weights > sum(x.nbytes for x in pair.base.parameters())


def test_tenants_count(llama_pairs: dict[str, Any]) -> None:
    base = hf.AutoModelForCausalLM.from_pretrained(llama_pairs["law"].base_folder)
    alone = lc.plan(base, context=1024, memory="1GiB").weights
    lc.deltas.load(base, {name: pair.folder for name, pair in llama_pairs.items() if name != "poems"}, slots=2)
    told = lc.plan(base, context=1024, memory="1GiB").weights
    assert told == alone + lc.deltas.report(base).device_bytes
    assert told == pytest.approx(held(base), rel=0.05)


def test_a_folder_whose_base_is_gone_is_refused(make_pair: Callable[..., Any]) -> None:
    pair = make_pair()
    pair.base_folder.rename(pair.base_folder.with_name("elsewhere"))
    with pytest.raises((FileNotFoundError, OSError), match="base"):
        build(pair.folder, "auto", META)
