"""Many tenants in one batch: each row is its fine-tune's, and nobody else's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_longctx as lc
from hf_longctx.kernels import reference
from hf_longctx.kernels.delta import MANY
from hf_longctx.weights.bitdelta import family
from hf_longctx.weights.bitdelta.attach import state_of
from hf_longctx.weights.bitdelta.embeddings import Table

TOLERANCE = 5e-6
"""Of logits, float32: sums run in another order than in the merged model."""

NAMES = ["law", "code", "__base__", "maths", "poems"]


@pytest.fixture
def model(llama_pairs: dict[str, Any]) -> Any:
    base = LlamaForCausalLM.from_pretrained(llama_pairs["law"].base_folder)
    return lc.deltas.load(base, {name: pair.folder for name, pair in llama_pairs.items()})


def batch(rows: int, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Left-padded rows, each of another length."""
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (rows, length), generator=made)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : row % (length - 2)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def dense(pairs: dict[str, Any], name: str) -> Any:
    """The model that a row of a name should be like."""
    if name == "poems":  # two bits, a scale per row: the definition is tested with the bits
        merged = LlamaForCausalLM.from_pretrained(pairs["law"].base_folder)
        return lc.deltas.load(merged, {name: pairs[name].folder}).merge_delta(name)
    return pairs["law"].base if name == "__base__" else pairs[name].stands_for()


@torch.no_grad()
def test_each_row_has_the_logits_of_its_merged_model(model: Any, llama_pairs: dict[str, Any]) -> None:
    inputs = batch(len(NAMES))
    logits = model(**inputs, adapter_names=NAMES).logits
    assert logits.shape[-1] == 70
    for row, name in enumerate(NAMES):
        alone = {key: x[row : row + 1] for key, x in inputs.items()}
        wanted = dense(llama_pairs, name)(**alone).logits[0]
        real = alone["attention_mask"][0].bool()
        torch.testing.assert_close(logits[row, real, : wanted.shape[-1]], wanted[real], atol=TOLERANCE, rtol=0)
        assert (logits[row, :, wanted.shape[-1] :] == -torch.inf).all()


@torch.no_grad()
def test_a_mixed_batch_generates_what_merged_models_do(model: Any, llama_pairs: dict[str, Any]) -> None:
    inputs = batch(len(NAMES))
    out = model.generate(**inputs, adapter_names=NAMES, max_new_tokens=6, do_sample=False)
    for row, name in enumerate(NAMES):
        alone = {key: x[row : row + 1] for key, x in inputs.items()}
        wanted = dense(llama_pairs, name).generate(**alone, max_new_tokens=6, do_sample=False)
        assert out[row].tolist() == wanted[0].tolist(), name


@torch.no_grad()
def test_many_rows_are_as_few(model: Any, llama_pairs: dict[str, Any]) -> None:
    """Where the product with the weights and that with the signs are one operation."""
    inputs = batch(len(NAMES), length=100)
    logits = model(**inputs, adapter_names=NAMES).logits
    assert logits.shape[0] * logits.shape[1] >= MANY
    for row, name in enumerate(NAMES):
        alone = {key: x[row : row + 1] for key, x in inputs.items()}
        wanted, real = dense(llama_pairs, name)(**alone).logits[0], inputs["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row, real, : wanted.shape[-1]], wanted[real], atol=2 * TOLERANCE, rtol=0)


@torch.no_grad()
def test_layers_that_get_the_same_rows_are_one_call(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, names, layers = batch(3, length=4), ["law", "__base__", "maths"], []
    wanted = model(**inputs, adapter_names=names).logits

    def joined(x: torch.Tensor, weights: Any, *others: Any) -> tuple[torch.Tensor, ...]:
        layers.append(len(weights))
        made: tuple[torch.Tensor, ...] = reference.OPS["linears_with_delta"].run(x, weights, *others)
        return made

    monkeypatch.setattr(family, "joined", joined)
    torch.testing.assert_close(model(**inputs, adapter_names=names).logits, wanted, atol=TOLERANCE, rtol=0)
    of_layer = [3, 1, 2, 1]  # queries, keys and values; their output; both halves of the gate; down
    assert layers == of_layer * model.config.num_hidden_layers
    layers.clear()
    names[1] = "poems"  # has two bits a weight: a kind of its own
    model(**inputs, adapter_names=names)
    assert layers == [count for count in of_layer for _ in range(2)] * model.config.num_hidden_layers


@torch.no_grad()
def test_beams_are_rows_of_their_tenant(model: Any, llama_pairs: dict[str, Any]) -> None:
    inputs = batch(2)
    knobs: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    out = model.generate(**inputs, adapter_names=["law", "maths"], **knobs)
    for row, name in enumerate(["law", "maths"]):
        alone = {key: x[row : row + 1] for key, x in inputs.items()}
        wanted = dense(llama_pairs, name).generate(**alone, **knobs)
        assert out[row].tolist() == wanted[0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_does_not_depend_on_the_others(llama_pairs: dict[str, Any], dtype: torch.dtype) -> None:
    base = LlamaForCausalLM.from_pretrained(llama_pairs["law"].base_folder, dtype=dtype)
    model = lc.deltas.load(base, {name: pair.folder for name, pair in llama_pairs.items()})
    first, second = batch(4), batch(4, seed=1)
    second["input_ids"][0] = first["input_ids"][0]
    one = model(**first, adapter_names=["law", "code", "__base__", "maths"]).logits[0]
    for names in (["law"] * 4, ["law", "poems", "maths", "code"], ["law", "__base__", "__base__", "__base__"]):
        other = model(**second, adapter_names=names).logits[0]
        assert torch.equal(one[:, :64], other[:, :64]), names


@torch.no_grad()
def test_base_rows_are_the_base_bit_for_bit(model: Any, llama_pairs: dict[str, Any]) -> None:
    inputs = batch(3)
    wanted = llama_pairs["law"].base(**inputs).logits
    assert torch.equal(model(**inputs).logits, wanted)
    mixed = model(**inputs, adapter_names=["__base__", "law", "__base__"]).logits
    assert torch.equal(mixed[::2], wanted[::2])
    lc.deltas.unload(model)
    assert torch.equal(model(**inputs).logits, wanted)
    assert not any(name in vars(model) for name in ("generate", "add_delta", "deltas"))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_the_active_tenant_has_the_rows_that_nobody_names(model: Any) -> None:
    inputs = batch(2)
    named = model(**inputs, adapter_names=["law", "law"]).logits
    model.set_delta("law")
    assert torch.equal(model(**inputs).logits, named)
    model.set_delta(None)
    assert not torch.equal(model(**inputs).logits, named)


class Watch:
    """A stopping criterion that does something once."""

    def __init__(self, do: Any, at: int = 2) -> None:
        self.do, self.at, self.calls = do, at, 0

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            self.do()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def test_what_is_wrong_with_names_is_said_before_anything_is_computed(model: Any) -> None:
    inputs, seen = batch(2), []
    model.model.register_forward_pre_hook(lambda *args: seen.append(1))
    for names, said in (
        (["law", "lax"], "names among law, code, maths, poems, __base__; got lax"),
        (["law", "code", "law"], "2 rows for 3 names"),
        ([], "a name for each row"),
    ):
        with pytest.raises(ValueError, match=said):
            model.generate(**inputs, adapter_names=names, max_new_tokens=2)
    with pytest.raises(ValueError, match="row 1 of 'law': expected tokens below 64; got 69"):
        model.generate(torch.tensor([[69, 3], [69, 3]]), adapter_names=["code", "law"], max_new_tokens=2)
    assert not seen
    with pytest.raises(ValueError, match="names among"):
        model(**inputs, adapter_names=["lax", "law"])
    assert model(**inputs).logits.isfinite().all()


@torch.no_grad()
def test_more_tenants_than_slots_take_turns(llama_pairs: dict[str, Any], model: Any) -> None:
    inputs = batch(2)
    few = LlamaForCausalLM.from_pretrained(llama_pairs["law"].base_folder)
    lc.deltas.load(few, {name: pair.folder for name, pair in llama_pairs.items()}, slots=2)
    assert few.deltas() == {"law": "device", "code": "device", "maths": "host", "poems": "host"}
    for names in (["law", "code"], ["maths", "law"], ["poems", "__base__"], ["code", "maths"], ["law", "law"]):
        wanted = model(**inputs, adapter_names=names).logits
        assert torch.equal(few(**inputs, adapter_names=names).logits, wanted), names
    assert few.deltas() == {"law": "device", "code": "host", "maths": "device", "poems": "host"}
    with pytest.raises(ValueError, match="at most 2 tenants in a batch; got 3"):
        few.generate(**batch(3), adapter_names=["law", "code", "maths"], max_new_tokens=1)
    told = lc.deltas.report(few)
    assert set(told.resident) == {"maths", "law"}
    assert told.slots == 2 < len(told.tenants)
    assert told.tenants["maths"] < told.tenants["law"] < told.tenants["poems"]
    assert "law: " in str(told)
    assert "2 slots" in str(told)


@torch.no_grad()
def test_tenants_come_and_go_while_others_generate(llama_pairs: dict[str, Any], model: Any) -> None:
    inputs = batch(2)
    knobs: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "adapter_names": ["law", "__base__"]}
    wanted = model.generate(**inputs, **knobs)
    hot = LlamaForCausalLM.from_pretrained(llama_pairs["law"].base_folder)
    lc.deltas.load(hot, {"law": llama_pairs["law"].folder, "maths": llama_pairs["maths"].folder}, slots=3)

    def change() -> None:
        hot.add_delta("poems", llama_pairs["poems"].folder)  # wider: all slots move
        hot.delete_delta("maths")
        hot.add_delta("code", llama_pairs["code"].folder)
        with pytest.raises(ValueError, match="a tenant without running rows"):
            hot.delete_delta("law")

    out = hot.generate(**inputs, **knobs, stopping_criteria=[Watch(change)])
    assert torch.equal(out, wanted)
    assert set(hot.deltas()) == {"law", "poems", "code"}
    mixed = ["poems", "code"]
    assert torch.equal(hot(**inputs, adapter_names=mixed).logits, model(**inputs, adapter_names=mixed).logits)


@torch.no_grad()
def test_a_freed_slot_leaves_nothing_behind(model: Any, llama_pairs: dict[str, Any]) -> None:
    inputs = batch(2)
    before = model(**inputs, adapter_names=["maths", "__base__"]).logits
    model.delete_delta("law")
    with pytest.raises(ValueError, match="a new name"):
        model.add_delta("code", llama_pairs["maths"].folder)
    model.add_delta("again", llama_pairs["maths"].folder)  # where law was, which differs in more
    assert torch.equal(model(**inputs, adapter_names=["again", "__base__"]).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("name", ["law", "code"])
def test_a_merged_tenant_is_an_ordinary_model(llama_pairs: dict[str, Any], name: str) -> None:
    inputs, pair = batch(2), llama_pairs[name]
    model = LlamaForCausalLM.from_pretrained(pair.base_folder)
    lc.deltas.load(model, {name: pair.folder, "poems": llama_pairs["poems"].folder})
    with pytest.raises(ValueError, match="no other tenants of the base; got poems"):
        model.merge_delta(name)
    model.delete_delta("poems")
    apart = model(**inputs, adapter_names=[name, name]).logits
    assert model.merge_delta(name) is model
    torch.testing.assert_close(model(**inputs).logits, apart, atol=TOLERANCE, rtol=0)
    wanted = pair.stands_for().state_dict()
    for key, x in model.state_dict().items():
        torch.testing.assert_close(x, wanted[key], atol=1e-6, rtol=0)
    assert model.config.vocab_size == len(model.lm_head.weight) == model.lm_head.out_features


@torch.no_grad()
@pytest.mark.parametrize("method", ["dense", "streaming_llm"])
def test_with_a_patched_model(model: Any, llama_pairs: dict[str, Any], method: str) -> None:
    inputs = batch(len(NAMES), length=24)
    knobs: dict[str, Any] = {"sinks": 2, "window": 10} if method == "streaming_llm" else {}
    lc.patch(model, method, **knobs)
    out = model.generate(**inputs, adapter_names=NAMES, max_new_tokens=6, do_sample=False)
    for row, name in enumerate(NAMES):
        alone = {key: x[row : row + 1] for key, x in inputs.items()}
        merged = lc.patch(dense(llama_pairs, name), method, **knobs)
        wanted = merged.generate(**alone, max_new_tokens=6, do_sample=False)
        lc.unpatch(merged)
        assert out[row].tolist() == wanted[0].tolist(), name
    assert lc.report(model).method == method


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2, biases, tied", "gemma2, scaled embeddings"])
def test_embeddings_in_int8_stay_so_beside_others(make_pair: Any, family: str) -> None:
    """A tenant reads what it stores, and the device holds no more; the tables of the others are in 16 bits."""
    facts = {} if family == "llama" else {"vocab_size": 64}
    small, plain = (make_pair(family, seed, facts, dense=dense) for seed, dense in ((1, "int8"), (2, "native")))

    def served(**pairs: Any) -> Any:
        return lc.deltas.load(AutoModelForCausalLM.from_pretrained(small.base_folder), pairs)

    model, inputs = served(plain=plain.folder, small=small.folder), batch(3)
    logits = model(**inputs, adapter_names=["small", "plain", "__base__"]).logits
    merged = served(small=small.folder).merge_delta("small")
    alone = {key: x[:1] for key, x in inputs.items()}
    torch.testing.assert_close(logits[:1], merged(**alone).logits, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(
        logits[1], plain.stands_for()(**{key: x[1:2] for key, x in inputs.items()}).logits[0], atol=TOLERANCE, rtol=0
    )
    table = next(hook for hook in state_of(model).hooks.values() if isinstance(hook, Table))
    assert {x.dtype for x in table.buffers() if x.ndim == 3 and x.shape[-1] > 1} == {torch.int8, torch.float32}
    for one in (served(small=small.folder), served(plain=plain.folder)):  # a row does not know who else is there
        name = next(iter(one.deltas()))
        wanted = model(**inputs, adapter_names=[name] * 3).logits
        assert torch.equal(one(**inputs, adapter_names=[name] * 3).logits, wanted)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"bits": 2}, {"scales": "row"}, {"scales": "32"}])
def test_a_row_does_not_depend_on_what_tenants_there_are(
    llama_pairs: dict[str, Any], make_pair: Any, settings: dict[str, Any]
) -> None:
    """In rows of kinds of their own, each as if all were of its kind."""
    finer, inputs = make_pair("llama", 7, **settings), batch(3)

    def served(**pairs: Any) -> Any:
        base = LlamaForCausalLM.from_pretrained(finer.base_folder, dtype=torch.bfloat16)
        return lc.deltas.load(base, {name: pair.folder for name, pair in pairs.items()})

    mixed = served(law=llama_pairs["law"], finer=finer)
    both = mixed(**inputs, adapter_names=["law", "finer", "law"]).logits
    for name, pair, row in (("law", llama_pairs["law"], 0), ("finer", finer, 1)):
        wanted = served(**{name: pair})(**inputs, adapter_names=[name] * 3).logits
        assert torch.equal(mixed(**inputs, adapter_names=[name] * 3).logits, wanted)
        assert torch.equal(both[row], wanted[row])


@torch.no_grad()
def test_a_copied_model_serves_by_itself(model: Any) -> None:
    inputs = batch(2)
    wanted = model(**inputs, adapter_names=["law", "code"]).logits
    other = copy.deepcopy(model)
    model.delete_delta("law")
    assert torch.equal(other(**inputs, adapter_names=["law", "code"]).logits, wanted)


@torch.no_grad()
def test_a_model_that_is_cast_takes_its_tenants_along(model: Any, llama_pairs: dict[str, Any]) -> None:
    inputs = batch(2)
    single = model(**inputs, adapter_names=["law", "code"]).logits
    double = model.double()(**inputs, adapter_names=["law", "code"]).logits
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, atol=TOLERANCE, rtol=0)


def test_a_second_load_and_a_model_without_tenants(model: Any, llama_pairs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Call model\.add_delta"):
        lc.deltas.load(model, {"law": llama_pairs["law"].folder})
    with pytest.raises(ValueError, match="at least 1 slot"):
        lc.deltas.load(lc.deltas.unload(model), {}, slots=0)
    for ask in (lc.deltas.report, lc.deltas.unload):
        with pytest.raises(ValueError, match="a model that loads deltas"):
            ask(model)


@torch.no_grad()
def test_a_compiler_keeps_nobodys_tenants(model: Any) -> None:
    torch._dynamo.reset()
    inputs, run = batch(len(NAMES)), torch.compile(model, backend="eager")
    for names in (NAMES, NAMES[::-1], ["law"] * len(NAMES), None):
        expected = model(**inputs, adapter_names=names).logits
        assert torch.equal(run(**inputs, adapter_names=names).logits, expected)
    lc.patch(model, "dense")
    for names in (NAMES, NAMES[::-1]):
        expected = model(**inputs, adapter_names=names).logits
        assert torch.equal(run(**inputs, adapter_names=names).logits, expected)
