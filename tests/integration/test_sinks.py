"""Sinks of a model's own: a learned token in front of every text, and 1 more in the denominator of every softmax."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_longctx as lc
from hf_longctx.patch import state_of
from hf_longctx.testing import oracle_gradients, oracle_logits, tiny_llama

from ..methods.cases import LIMITS, LOSSY, SELECTING, Row, named
from ..methods.test_limits import TOLERANCE, error
from .cases import BY_NAME
from .snapshot import differences, snapshot
from .test_patch import logits
from .tiny import VOCABULARY

LLAMA = BY_NAME["llama"]
TOKEN = "<|sink|>"

# a learned token ------------------------------------------------------------------------------------------------------

A, B = ("$A", "$A $B:1")
POST: dict[str, Any] = {
    "none": None,
    "bytes": processors.ByteLevel(trim_offsets=False),
    "template": processors.TemplateProcessing(f"<s> {A} </s>", f"<s> {B} </s>", [("<s>", 1), ("</s>", 2)]),
    "roberta": processors.RobertaProcessing(("</s>", 2), ("<s>", 1)),
    "bert": processors.BertProcessing(("</s>", 2), ("<s>", 1)),
    "bytes, template": processors.Sequence(
        [processors.ByteLevel(), processors.TemplateProcessing(f"<s> {A}", f"<s> {B}", [("<s>", 1)])]
    ),
}


def tokenizer(post: Any = None, words: int = VOCABULARY, chat: Any = None) -> Any:
    """Whole words `w8`, `w9`, ...; begins and ends texts as `post` says."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, words)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if post is not None:
        made.post_processor = post
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, chat_template=chat, **names)


@pytest.mark.parametrize("post", POST)
def test_every_text_begins_with_the_token_and_goes_on_as_before(post: str) -> None:
    model, words = LLAMA.make(), tokenizer(POST[post])
    before = {texts: words(*texts).input_ids for texts in (("w8 w9",), ("w8", "w9"), ("",))}
    bare = words("w8 w9", add_special_tokens=False).input_ids
    sink = lc.add_sink_token(model, words)
    for texts, ids in before.items():
        assert words(*texts).input_ids == [sink, *ids]
    assert words("w8 w9", add_special_tokens=False).input_ids == bare
    assert words.decode(words("w8 w9").input_ids, skip_special_tokens=True) == "w8 w9"
    options = {"padding": True, "truncation": True, "max_length": 4, "padding_side": "left"}
    assert words(["w8 w9 w10 w11", "w8 w9 w10"], **options).input_ids[0][0] == sink


def test_a_text_that_is_saved_and_loaded_begins_with_it_too(tmp_path: Path) -> None:
    model, words = LLAMA.make(), tokenizer(POST["template"])
    sink = lc.add_sink_token(model, words)
    with torch.no_grad():
        model.get_input_embeddings().weight[sink] += 1  # as if it had been trained
    expected = model(torch.tensor([words("w8 w9").input_ids])).logits
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    loaded, again = hf.AutoModelForCausalLM.from_pretrained(tmp_path), hf.AutoTokenizer.from_pretrained(tmp_path)
    assert again("w8 w9").input_ids == words("w8 w9").input_ids
    assert lc.add_sink_token(loaded, again) == sink
    assert torch.equal(loaded.eval()(torch.tensor([again("w8 w9").input_ids])).logits, expected)


def test_a_second_call_changes_nothing() -> None:
    model, words = LLAMA.make(), tokenizer(POST["template"], chat="{% for m in messages %}{{ m.content }}{% endfor %}")
    sink = lc.add_sink_token(model, words)
    with torch.no_grad():
        model.get_input_embeddings().weight[sink] += 1
    before, text, chat = snapshot(model), words.backend_tokenizer.to_str(), words.chat_template
    assert lc.add_sink_token(model, words) == sink
    assert (words.backend_tokenizer.to_str(), words.chat_template) == (text, chat)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spare", [0, 8])
def test_its_embedding_is_the_mean_and_the_others_stay(tied: bool, spare: int) -> None:
    """Spare rows, as Qwen's vocabulary has them, are no part of the mean, and one of them is taken."""
    model = tiny_llama(vocab_size=64 + spare, tie_word_embeddings=tied)
    model.tie_weights()
    layers = [model.get_input_embeddings, model.get_output_embeddings]
    old = [layer().weight.detach().clone() for layer in layers]
    sink = lc.add_sink_token(model, tokenizer(words=64))
    assert sink == 64
    for layer, rows in zip(layers, old, strict=True):
        got = layer().weight
        assert got.shape[0] == max(65, 64 + spare)
        assert got.requires_grad
        assert torch.equal(got[:64], rows[:64])
        assert torch.equal(got[65:], rows[65:])
        torch.testing.assert_close(got[64], rows[:64].mean(0))
    assert (layers[0]().weight is layers[1]().weight) is tied
    assert model.config.vocab_size == max(65, 64 + spare)


def test_chats_begin_with_it_once() -> None:
    template = "{% for message in messages %}{{ bos_token + ' ' + message.content + ' ' }}{% endfor %}"
    for chat in (template, {"default": template, "tool_use": template}):
        words = tokenizer(chat=chat)
        talk = [{"role": "user", "content": "w8 w9"}]
        before = words.apply_chat_template(talk, tokenize=True)["input_ids"]
        sink = lc.add_sink_token(LLAMA.make(), words, 'it\'s "the" sink')
        assert words.apply_chat_template(talk, tokenize=True)["input_ids"] == [sink, *before]


def test_only_the_token_is_trained_where_adapters_say_so() -> None:
    model, words = LLAMA.make(), tokenizer()
    sink = lc.add_sink_token(model, words)
    old = model.get_input_embeddings().weight.detach().clone()
    settings = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [sink]})
    trained = peft.get_peft_model(lc.patch(model, lc.StreamingLLM(sinks=1, window=9), train=True), settings).train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.cat((torch.full((2, 1), sink), LLAMA.prompt(40, rows=2)), 1)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = trained(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    new = lc.unpatch(trained).merge_and_unload().get_input_embeddings().weight
    changed = (new != old).any(1).nonzero()[:, 0].tolist()
    assert changed == [sink]
    assert losses[-1] < losses[0]


def test_a_stream_keeps_the_token_and_no_other_sink() -> None:
    """The first key of the last step is that of the sink token, the others are of the window."""
    model, words = tiny_llama(), tokenizer(words=64)
    sink = lc.add_sink_token(model, words)
    ids = torch.tensor([words(" ".join(f"w{4 + i % 50}" for i in range(40))).input_ids])
    method = lc.StreamingLLM(sinks=1, window=9)
    lc.patch(model, method)
    parts, past = [], None
    with torch.no_grad():
        for part in ids.split(7, 1):
            out = model(part, past_key_values=past)
            past = out.past_key_values
            parts.append(out.logits)
    plan = lc.report(model).plan
    assert ids[0, 0] == sink
    assert lc.report(model).tokens_stored <= 10
    assert error(torch.cat(parts, 1).double(), oracle_logits(lc.unpatch(model), plan, ids)) < TOLERANCE


class Slow(hf.PythonBackend):  # type: ignore[misc,name-defined]
    """A tokenizer in Python, which has no post-processor."""

    vocab_size = 4

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return text.split()

    def _convert_token_to_id(self, token: str) -> int:
        return 0

    def _convert_id_to_token(self, index: int) -> str:
        return "a"


class Forgetful(hf.PreTrainedTokenizerFast):
    """A tokenizer whose class sets its own post-processor whenever it is loaded."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().from_pretrained(*args, **kwargs)
        made.backend_tokenizer.post_processor = processors.ByteLevel()
        return made


LORA = peft.LoraConfig(target_modules=["q_proj"])
REFUSALS: dict[str, tuple[type[Exception], str, Any, Any, str]] = {
    "no name": (ValueError, "got ''. Take another", LLAMA.make, tokenizer, ""),
    "ordinary word": (ValueError, "got 'w8'. Take another", LLAMA.make, tokenizer, "w8"),
    "patched": (ValueError, "an unpatched model", lambda: lc.patch(LLAMA.make(), "dense"), tokenizer, TOKEN),
    "adapters": (
        ValueError,
        "a model without adapters",
        lambda: peft.get_peft_model(LLAMA.make(), LORA),
        tokenizer,
        TOKEN,
    ),
    "slow": (lc.UnsupportedError, "got Slow", LLAMA.make, Slow, TOKEN),
    "forgetful": (
        lc.UnsupportedError,
        "got Forgetful, which saved and loaded makes",
        LLAMA.make,
        lambda: Forgetful(tokenizer_object=tokenizer().backend_tokenizer),
        TOKEN,
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_have_one_is_refused_and_unchanged(what: str) -> None:
    kind, words_of_error, make_model, make_tokenizer, token = REFUSALS[what]
    model, words = make_model(), make_tokenizer()
    before, known = snapshot(model), len(words)
    with pytest.raises(kind, match=words_of_error):
        lc.add_sink_token(model, words, token)
    assert differences(before, snapshot(model)) == []
    assert len(words) == known


# the zero sink --------------------------------------------------------------------------------------------------------


def softmax_plus_one(
    module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """exp(x) / (1 + sum of exp(x)), written out, over all earlier keys."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = ((q @ k.transpose(2, 3)) * scaling).exp().tril()
    return (weights / (1 + weights.sum(-1, keepdim=True)) @ v).transpose(1, 2), None


@pytest.fixture
def plus_one() -> Any:
    """A stock model with that attention."""
    ALL_ATTENTION_FUNCTIONS["plus_one"] = softmax_plus_one
    model = LLAMA.make()
    model.set_attn_implementation("plus_one")
    yield model
    ALL_ATTENTION_FUNCTIONS.pop("plus_one")


@pytest.mark.parametrize("row", [row for row in LIMITS if not row.name.startswith(("lserve", "inf"))], ids=named)
def test_zero_sink_is_one_more_in_the_denominator(row: Row, plus_one: Any) -> None:
    ids = LLAMA.prompt(60, rows=2)
    model = lc.patch(LLAMA.make(), row.method(LLAMA), zero_sink=True)
    with torch.no_grad():
        assert error(model(ids).logits, plus_one(ids).logits) < TOLERANCE
        assert error(model(ids).logits, lc.patch(LLAMA.make(), row.method(LLAMA))(ids).logits) > 0.01
    got, expected = (m(ids, labels=ids).loss for m in (model, plus_one))
    for loss in (got, expected):
        loss.backward()
    for (name, x), y in zip(model.named_parameters(), plus_one.parameters(), strict=True):
        assert error(x.grad, y.grad) < 1e-4, name


@pytest.mark.parametrize("row", [*LOSSY, *SELECTING], ids=named)
def test_zero_sink_in_every_method_is_the_oracles(row: Row) -> None:
    """One call, chunks and steps of a text that is mostly dropped."""
    model, ids = LLAMA.make(), LLAMA.prompt(46)
    calls = [24, 12, *[1] * 10]
    lc.patch(model, row.method(LLAMA), zero_sink=True)
    plan = lc.report(model).plan
    assert "1 added to the denominator" in plan.describe()
    assert lc.Plan.from_json(plan.to_json()) == plan
    parts, past = [], None
    with torch.no_grad():
        for part in ids.split(calls, 1):
            out = model(part, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
    expected = oracle_logits(lc.unpatch(model), plan, ids, calls=calls)
    assert error(torch.cat(parts, 1).double(), expected) < 1e-4


def test_zero_sink_trains_with_the_gradient_of_the_oracle() -> None:
    model, ids = LLAMA.make(), LLAMA.prompt(40, rows=2)
    lc.patch(model, LOSSY[0].method(LLAMA), zero_sink=True, train=True).train()
    model(ids, labels=ids).loss.backward()
    plan = lc.report(model).plan
    expected = oracle_gradients(lc.unpatch(model), plan, ids, ids)
    for name, weight in model.named_parameters():
        assert error(weight.grad.double(), expected[name]) < 1e-4, name


def test_unpatch_takes_the_zero_sink_off_bit_for_bit() -> None:
    model = LLAMA.make()
    before, expected = snapshot(model), logits(model)
    with lc.patched(model, "dense", zero_sink=True):
        assert not torch.equal(logits(model), expected)
        with lc.patched(model, "dense"):
            assert error(logits(model), expected) < TOLERANCE
        assert lc.report(model).plan.zero_sink
    assert torch.equal(logits(model), expected)
    assert differences(before, snapshot(model)) == []


def test_a_cache_is_not_shared_by_two_softmaxes() -> None:
    model = lc.patch(LLAMA.make(), "dense", zero_sink=True)
    cache = model(LLAMA.prompt(10)).past_key_values
    lc.patch(model, "dense")
    with pytest.raises(TypeError, match="Start a new cache"):
        model(LLAMA.prompt(2), past_key_values=cache)


def test_parts_of_plans_with_a_zero_sink_have_one() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    plan = dataclasses.replace(lc.report(model).plan, zero_sink=True)
    lc.patch(model, prefill=plan, kv="int8")
    assert lc.report(model).plan.zero_sink


def test_a_model_with_learned_sinks_is_refused() -> None:
    model = BY_NAME["gpt_oss"].make()
    with pytest.raises(lc.UnsupportedError, match="got 'gpt_oss', which has learned one for each head"):
        lc.patch(model, "dense", zero_sink=True)
    assert state_of(model) is None
