"""Gradients, adapters of weights and training loops on a patched model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

import hf_longctx as lc
from hf_longctx.testing import oracle_gradients

from ..methods.cases import LIMITS, LOSSY, SELECTING, Row, gates, named, pairs
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


# training on purpose --------------------------------------------------------------------------------------------------

TRAINABLE = (LIMITS[0], *LOSSY, SELECTING[1])
ROTARY = tuple(BY_NAME[name] for name in ("llama", "gemma2", "gpt_oss", "smollm3"))


@pytest.mark.parametrize(("row", "case"), pairs(TRAINABLE, ROTARY), ids=named)
def test_gradients_are_those_of_the_oracle(row: Row, case: Case) -> None:
    """A padded batch, of which some labels do not count; the oracle is dense attention under the plan's mask."""
    model, ids = case.make(), case.prompt(40, rows=2)
    mask = (torch.arange(40) >= torch.tensor([0, 11])[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(40) % 5 == 0), -100)
    lc.patch(model, row.method(case), train=True).train()
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    plan, got = lc.report(model).plan, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = oracle_gradients(lc.unpatch(model).eval(), plan, ids, labels, mask)
    assert_same({name: grad.double() for name, grad in got.items()}, expected)
    if row.name != "dense":
        dense = oracle_gradients(model, lc.report(lc.patch(case.make(), "dense")).plan, ids, labels, mask)
        assert any(error(expected[name], dense[name]) > 0.1 for name in dense)


@pytest.mark.parametrize("row", TRAINABLE, ids=named)
def test_packed_texts_have_the_gradients_of_each_by_itself(row: Row) -> None:
    model, ids = lc.patch(LLAMA.make(), row.method(LLAMA), train=True).train(), LLAMA.prompt(60)
    at = torch.cat([torch.arange(23), torch.arange(37)])[None]
    model(ids, position_ids=at).logits.square().sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for text in ids.split([23, 37], 1):
        model(text).logits.square().sum().backward()
    assert_same(got, {name: p.grad for name, p in model.named_parameters()})
    with pytest.raises(lc.UnsupportedError, match="got packed sequences"):
        model(ids, position_ids=at, attention_mask=torch.ones(1, 60))


THREE_LAYERS = BY_NAME["llama_multi_query"]  # the first two of Quest are dense
WITHOUT: dict[str, tuple[dict[str, Any], str]] = {
    "quest": ({"method": "quest"}, "'quest', which chooses what decode steps read"),
    "auto": ({}, "'auto: quest', which chooses what decode steps read"),
    "lserve": (
        {"method": lc.LServe(gates(THREE_LAYERS), kv="native")},
        "'lserve', which chooses what decode steps read",
    ),
    "inf_llm": ({"method": "inf_llm"}, "'inf_llm', which reads its keys and values back from memory"),
    "int8": ({"method": lc.Dense("int8")}, "'dense', which rounds keys and values to 8 bits"),
    "int4": ({"method": "streaming_llm", "kv": "int4"}, "which rounds keys and values to 4 bits"),
    "parts": ({"prefill": lc.XAttention(), "decode": lc.Quest()}, r"'xattention \+ quest', which chooses"),
}


@pytest.mark.parametrize("what", WITHOUT)
def test_a_method_without_a_gradient_is_refused_by_name(what: str) -> None:
    arguments, words = WITHOUT[what]
    model = THREE_LAYERS.make()
    before = snapshot(model)
    with pytest.raises(lc.UnsupportedError, match=words) as refused:
        lc.patch(model, **arguments, train=True)
    assert "Train with 'dense', 'streaming_llm', 'duo_attention' or 'xattention'" in str(refused.value)
    assert differences(before, snapshot(model)) == []
    lc.patch(model, "dense", train=True)
    with pytest.raises(lc.UnsupportedError, match=words):
        lc.patch(model, **arguments, train=True)
    assert lc.report(model).method == "dense"


def test_a_training_call_has_no_cache_and_generation_has_one() -> None:
    model, ids = lc.patch(LLAMA.make(), LOSSY[0].method(LLAMA), train=True).train(), LLAMA.prompt(20)
    assert model(ids).past_key_values is None
    with lc.patched(model, "quest"):
        assert isinstance(model(ids).past_key_values, lc.LongContextCache)
    assert model(ids).past_key_values is None
    assert isinstance(model.eval()(ids).past_key_values, lc.LongContextCache)


@pytest.mark.parametrize("row", TRAINABLE, ids=named)
def test_bf16_gradients_point_the_same_way(row: Row) -> None:
    exact = gradients(lc.patch(LLAMA.make().train(), row.method(LLAMA), train=True), LLAMA)
    rough = gradients(lc.patch(LLAMA.make().bfloat16().train(), row.method(LLAMA), train=True), LLAMA)
    for name, grad in rough.items():
        assert grad.dtype == torch.bfloat16
        assert torch.cosine_similarity(grad.float().flatten(), exact[name].flatten(), 0) > 0.95, name


# Trainer --------------------------------------------------------------------------------------------------------------


def texts(number: int = 32, tokens: int = 48) -> list[dict[str, list[int]]]:
    """Texts that count up by three, so that there is something to learn; the first labels do not count."""
    found = []
    for first in range(number):
        ids = [8 + (first * 7 + 3 * i) % 100 for i in range(tokens - first % 4 * 8)]
        found.append({"input_ids": ids, "labels": [-100] * 8 + ids[8:]})
    return found


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def table(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])

    ids = table("input_ids", 0)
    return {"input_ids": ids, "labels": table("labels", -100), "attention_mask": (ids != 0).long()}


def fit(model: Any, folder: Any, collator: Any = collate, steps: int = 24, **options: Any) -> list[float]:
    """Losses of a `Trainer` run, step by step."""
    settings = hf.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=steps,
        report_to="none",
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        **options,
    )
    trainer = hf.Trainer(model, settings, train_dataset=texts(), data_collator=collator)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def fresh(method: Any = None) -> Any:
    """A model with untrained adapters, patched to train unless no method is given."""
    torch.manual_seed(0)
    base = LLAMA.make()
    settings = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(base if method is None else lc.patch(base, method, train=True), settings)


RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "bf16": {"bf16": True},
    "packed": {"collator": hf.DataCollatorWithFlattening()},
}


@pytest.mark.parametrize("run", RUNS)
def test_a_trainer_run_with_everything_kept_has_the_losses_of_the_unpatched_one(run: str, tmp_path: Path) -> None:
    expected = fit(fresh(), tmp_path / "stock", **RUNS[run])
    got = fit(fresh("dense"), tmp_path / "patched", **RUNS[run])
    tolerance = 0.02 if run == "bf16" else 1e-3  # sums of bf16 are rounded in another order
    assert max(abs(a - b) for a, b in zip(got, expected, strict=True)) < tolerance
    assert sum(got[-4:]) < 0.8 * sum(got[:4])


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("row", TRAINABLE[1:], ids=named)
def test_a_sparse_trainer_run_learns_and_its_adapter_is_an_ordinary_one(row: Row, run: str, tmp_path: Path) -> None:
    model = fresh(row.method(LLAMA))
    losses = fit(model, tmp_path, **RUNS[run])
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    saved = next(tmp_path.glob("checkpoint-*"))
    assert (saved / "adapter_model.safetensors").exists()
    assert all(b"hf_longctx" not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
    loaded = peft.PeftModel.from_pretrained(LLAMA.make(), saved).eval()
    trained = model.get_base_model().eval()  # Trainer leaves its autocast on the model outside
    assert torch.equal(logits(lc.patch(loaded, row.method(LLAMA))), logits(trained))
    assert torch.equal(logits(lc.unpatch(loaded)), logits(lc.unpatch(trained)))


def test_a_patched_model_is_saved_as_an_unpatched_one(tmp_path: Path) -> None:
    for name, model in (("stock", LLAMA.make()), ("ours", lc.patch(LLAMA.make(), LOSSY[0].method(LLAMA), train=True))):
        model.save_pretrained(tmp_path / name)
    stock, ours = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("stock", "ours"))
    assert ours == stock


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
