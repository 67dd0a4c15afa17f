"""Gradients, adapters of weights and training loops on a patched model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch

import hf_longctx as lc

from ..methods.cases import LIMITS, LOSSY, Row, named, pairs
from ..methods.test_limits import TOLERANCE, error
from .cases import BY_NAME
from .snapshot import differences, hooks, snapshot
from .test_generate import batch, generate
from .test_patch import logits
from .tiny import Case

LLAMA = BY_NAME["llama"]
SOME = tuple(BY_NAME[name] for name in ("llama", "gemma2", "gpt_oss", "falcon_new", "mpt", "smollm3"))
lossy = pytest.mark.parametrize("row", LOSSY, ids=named)


def gradients(model: Any, case: Case, **inputs: Any) -> dict[str, torch.Tensor]:
    """Of the language-modelling loss, by parameter."""
    ids = case.prompt(60, rows=2)
    model.zero_grad()
    model(ids, labels=ids, **inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-4) -> None:
    """Equal up to rounding; a gradient is a sum over many tokens, so more of it than a logit has."""
    assert got.keys() == expected.keys()
    worst = {name: error(got[name], expected[name]) for name in got if expected[name].abs().max() > 1e-6}
    assert max(worst.values()) < tolerance, worst


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("use_cache", [False, True], ids=["no_cache", "cache"])
@pytest.mark.parametrize(("row", "case"), pairs(LIMITS, SOME), ids=named)
def test_gradients_at_the_limit_are_those_of_the_unpatched_model(
    row: Row, case: Case, use_cache: bool, train: bool
) -> None:
    expected = gradients(case.make().train(train), case, use_cache=use_cache)
    model = lc.patch(case.make().train(train), row.method(case))
    if row.name.startswith("inf_llm"):
        with pytest.raises(lc.UnsupportedError, match="gradient"):
            gradients(model, case, use_cache=use_cache)
        return
    assert_same(gradients(model, case, use_cache=use_cache), expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("row", "case"), pairs((*LIMITS[:2], *LOSSY), tuple(case for case in SOME if case.interface)), ids=named
)
def test_gradient_checkpointing_changes_no_gradient(row: Row, case: Case, reentrant: bool) -> None:
    model = lc.patch(case.make().train(), row.method(case))
    expected = gradients(model, case, use_cache=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(gradients(model, case), expected, 1e-6)


@pytest.mark.parametrize("name", ["falcon_new", "mpt"])
def test_gradient_checkpointing_where_layers_do_not_get_our_context(name: str) -> None:
    """Layers run again outside the call, and these families do not hand arguments down to them."""
    case = BY_NAME[name]
    model = lc.patch(case.make().train(), "dense")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(lc.UnsupportedError, match="Turn gradient checkpointing off"):
        gradients(model, case)


@lossy
def test_training_steps_lower_the_loss_and_keep_the_plan(row: Row) -> None:
    model = lc.patch(LLAMA.make().train(), row.method(LLAMA))
    ids = LLAMA.prompt(40, rows=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    with torch.no_grad():
        steps = generate(model.eval(), batch(LLAMA)).sequences
        assert torch.equal(steps, generate(model, batch(LLAMA), use_cache=False).sequences)


def test_dropout_in_attention_is_refused_in_training_only() -> None:
    model = LLAMA.make()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    lc.patch(model, "dense")
    assert torch.equal(logits(model), logits(lc.patch(LLAMA.make(), "dense")))
    with pytest.raises(lc.UnsupportedError, match=r"got dropout=0.1. To go on, set attention_dropout=0"):
        logits(model.train())


@lossy
def test_training_on_a_filled_cache_is_right_or_refused(row: Row) -> None:
    """What is stored is cut off from its gradient, so keys of a later call must not be read back from there."""
    model = lc.patch(LLAMA.make().train(), row.method(LLAMA))
    ids = LLAMA.prompt(20)
    with torch.no_grad():
        cache = model(ids[:, :12]).past_key_values
    with pytest.raises(lc.UnsupportedError, match="train"):
        model(ids[:, 12:], past_key_values=cache)


FILLED = "got one through a call that went on from a filled cache"


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("row", [LIMITS[0], *LOSSY], ids=named)
def test_a_backward_pass_through_a_filled_cache_is_refused(row: Row, tokens: int) -> None:
    """In eval mode the call itself must work, as decoding without `no_grad` is common."""
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    ids = LLAMA.prompt(12 + tokens)
    first = model(ids[:, :12])
    more = model(ids[:, 12:], past_key_values=first.past_key_values, output_hidden_states=True)
    with torch.no_grad():
        assert error(more.logits, model(ids).logits[:, 12:]) < TOLERANCE
    for output in (more.logits, more.hidden_states[1]):
        with pytest.raises(lc.UnsupportedError, match=FILLED):
            output.sum().backward(retain_graph=True)
    model.zero_grad()
    first.logits.sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    stock = lc.patch(LLAMA.make(), row.method(LLAMA)) if row.name != "dense" else LLAMA.make()
    stock(ids[:, :12], use_cache=False).logits.sum().backward()
    assert_same(got, {name: p.grad for name, p in stock.named_parameters()})


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
def test_no_part_of_a_gradient_is_lost_in_silence(part: str) -> None:
    """Where only keys or values are trained, nothing that is read back from the cache would ask for a gradient."""
    model = lc.patch(LLAMA.make(), "dense")
    for name, weight in model.named_parameters():
        weight.requires_grad_(part in name or "lm_head" in name)
    ids = LLAMA.prompt(20)
    cache = model(ids[:, :12]).past_key_values
    with pytest.raises(lc.UnsupportedError, match=FILLED):
        model(ids[:, 12:], past_key_values=cache).logits.sum().backward()


def test_what_stands_behind_attention_can_be_trained_on_a_filled_cache() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    model.model.requires_grad_(False)
    ids = LLAMA.prompt(20)
    cache = model(ids[:, :12]).past_key_values
    model(ids[:, 12:], past_key_values=cache).logits.sum().backward()
    got = model.lm_head.weight.grad.clone()
    model.zero_grad()
    model(ids).logits[:, 12:].sum().backward()
    assert error(got, model.lm_head.weight.grad) < TOLERANCE


# PEFT -----------------------------------------------------------------------------------------------------------------


def lora(model: Any) -> Any:
    """Adapters that change the logits, not the zeros that they start as."""
    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, settings).eval()


ORDERS: dict[str, Callable[[Any], Any]] = {
    "before": lambda method: lora(lc.patch(LLAMA.make(), method)),
    "after": lambda method: lc.patch(lora(LLAMA.make()), method),
}


@pytest.mark.parametrize("order", ORDERS)
@lossy
def test_lora_before_and_after(row: Row, order: str) -> None:
    model = ORDERS[order](row.method(LLAMA))
    merged = lora(LLAMA.make()).merge_and_unload()
    expected = generate(lc.patch(merged, row.method(LLAMA)), batch(LLAMA)).sequences
    assert torch.equal(generate(model, batch(LLAMA)).sequences, expected)
    assert lc.report(model).method == row.name
    assert lc.report(model.get_base_model()).method == row.name
    with model.disable_adapter():
        bare = generate(model, batch(LLAMA)).sequences
    assert torch.equal(bare, generate(lc.patch(LLAMA.make(), row.method(LLAMA)), batch(LLAMA)).sequences)
    lc.unpatch(model)
    assert error(logits(model), logits(lora(LLAMA.make()))) == 0


def test_lora_merged_while_patched() -> None:
    model = lora(lc.patch(LLAMA.make(), LOSSY[0].method(LLAMA)))
    expected = logits(model)
    merged = model.merge_and_unload()
    assert error(logits(merged), expected) < TOLERANCE
    assert hooks(lc.unpatch(merged)) == 0


@lossy
def test_lora_is_trained_on_the_visibility_of_the_plan(row: Row) -> None:
    model = lora(lc.patch(LLAMA.make(), row.method(LLAMA)))
    stock = lora(LLAMA.make())
    got, expected = gradients(model, LLAMA), gradients(stock, LLAMA)
    assert got.keys() == expected.keys()
    assert all("lora" in name for name in got)
    assert any(error(got[name], expected[name]) > 0.1 for name in got)


@pytest.mark.parametrize("settings", [peft.PromptTuningConfig, peft.PrefixTuningConfig], ids=lambda kind: kind.__name__)
def test_prompt_learning_is_refused(settings: Any) -> None:
    model = peft.get_peft_model(LLAMA.make(), settings(task_type="CAUSAL_LM", num_virtual_tokens=4))
    before = snapshot(model)
    with pytest.raises(lc.UnsupportedError, match="got prompt learning"):
        lc.patch(model, "dense")
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("use_cache", [False, True], ids=["no_cache", "cache"])
def test_chosen_blocks_of_few_bits_refuse_a_backward_pass(use_cache: bool) -> None:
    """Keys and values are read as they are stored, so a part of the gradient would be missing."""
    model = lc.patch(LLAMA.make(), lc.XAttention(stride=4, tau=0.2, block=8, kv="int8", dense_below=0))
    with pytest.raises(lc.UnsupportedError, match="without a gradient"):
        gradients(model, LLAMA, use_cache=use_cache)
