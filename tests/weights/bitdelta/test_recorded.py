"""Steps beside tenants that are recorded and replayed: the same tokens, whoever comes and goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_longctx as lc
from tests.integration.again import Again, recorders
from tests.integration.test_ahead import at_once, counted

from .test_tenants import NAMES, Watch, batch

KNOBS: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture
def again() -> Iterator[type[Again]]:
    with recorders() as made:
        yield made


def serving(pairs: dict[str, Any], slots: int | None = None, but: tuple[str, ...] = ()) -> Any:
    base = LlamaForCausalLM.from_pretrained(pairs["law"].base_folder)
    return lc.deltas.load(base, {name: pair.folder for name, pair in pairs.items() if name not in but}, slots=slots)


@pytest.mark.parametrize("method", ["dense", "quest"])
def test_tokens_are_those_of_steps_that_are_not_recorded(llama_pairs: Any, again: type[Again], method: str) -> None:
    knobs = {"token_budget": 32, "page": 8} if method == "quest" else {}
    inputs, eager, model = batch(5, 40), serving(llama_pairs), serving(llama_pairs)
    lc.patch(eager, method, cuda_graph=False, **knobs)
    lc.patch(model, method, **knobs)
    for names in (NAMES, NAMES[::-1], ["law"] * 5, None):
        asked = {} if names is None else {"adapter_names": names}
        before = again.replayed
        wanted = eager.generate(**inputs, **asked, **KNOBS)
        assert torch.equal(model.generate(**inputs, **asked, **KNOBS), wanted), names
        assert again.replayed - before >= 8, names
        assert lc.report(model).eager is None


def test_a_step_after_the_last_one_leaves_no_trace(llama_pairs: Any, again: type[Again]) -> None:
    """Rows of tenants that end at different tokens, asked late and at once."""
    inputs, found = batch(5, 40), []
    knobs = {"max_new_tokens": 40, "do_sample": True, "eos_token_id": list(range(16)), "pad_token_id": 0}
    for late in (True, False):
        model = lc.patch(serving(llama_pairs), "dense")
        with pytest.MonkeyPatch.context() as patch, counted(patch) as seen:
            if not late:
                at_once(patch)
            torch.manual_seed(0)
            found.append((model.generate(**inputs, adapter_names=NAMES, **knobs), torch.get_rng_state()))
        assert (seen.late > 0) == (seen.back > 0) == late
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_a_tenant_that_takes_a_slot_is_recorded_anew(llama_pairs: Any, again: type[Again]) -> None:
    inputs, eager, model = batch(2, 16), serving(llama_pairs, 2), serving(llama_pairs, 2)
    lc.patch(eager, "dense", cuda_graph=False)
    lc.patch(model, "dense")
    for names in (["law", "code"], ["maths", "poems"], ["law", "maths"]):
        wanted = eager.generate(**inputs, **KNOBS, adapter_names=names)
        assert torch.equal(model.generate(**inputs, **KNOBS, adapter_names=names), wanted), names


@pytest.mark.parametrize("leaving", ["maths", None])
def test_tenants_come_and_go_between_replays(llama_pairs: Any, again: type[Again], leaving: str | None) -> None:
    inputs, names = batch(2), ["law", "__base__"]
    wanted = serving(llama_pairs).generate(**inputs, **KNOBS, adapter_names=names)
    hot = serving(llama_pairs, 3, but=("poems",))
    lc.patch(hot, "dense")

    def change() -> None:
        if leaving is not None:
            hot.delete_delta(leaving)
        hot.add_delta("poems", llama_pairs["poems"].folder)  # two planes: what all tenants have is made anew

    stop = Watch(change, at=6)
    assert torch.equal(hot.generate(**inputs, **KNOBS, adapter_names=names, stopping_criteria=[stop]), wanted)
    assert (again.recorded > 1) == (leaving is not None)  # without a free slot it waits in host memory
    assert again.replayed >= 8


@torch.no_grad()
def test_many_prompts_do_not_push_out_what_recorded_steps_read(llama_pairs: Any, again: type[Again]) -> None:
    model, asked = serving(llama_pairs), {"adapter_names": ["law", "code"]}
    lc.patch(model, "dense")
    cache = model(**batch(2, 9), **asked).past_key_values
    token, mask = torch.tensor([[3], [4]]), batch(2, 9)["attention_mask"]

    def step() -> None:
        nonlocal mask
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        model(token, attention_mask=mask, past_key_values=cache, **asked)

    for _ in range(3):
        step()
    recorded, replayed = again.recorded, again.replayed
    for length in range(2, 30):
        model(**batch(2, length + 2), **asked)
    step()
    assert (again.recorded, again.replayed) == (recorded, replayed + 1)


def test_experts_look_at_values_and_are_not_recorded(make_pair: Any, again: type[Again]) -> None:
    pair = make_pair("qwen3-moe, experts")
    model = lc.deltas.load(AutoModelForCausalLM.from_pretrained(pair.base_folder), {"law": pair.folder})
    lc.patch(model, "dense")
    model.generate(**batch(2), **KNOBS, adapter_names=["law", "__base__"])
    assert again.recorded == 0
    assert "a module has a hook" in str(lc.report(model).eager)
