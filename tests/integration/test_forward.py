"""Plain forward calls: with and without a cache, every way to pass arguments, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from transformers.cache_utils import DynamicCache

import hf_longctx as lc

from ..methods.cases import LIMITS, LOSSY, SELECTING, Row, gates, named, pairs
from ..methods.test_limits import TOLERANCE, error
from .cases import BY_NAME, WINDOW
from .tiny import Case

LLAMA = BY_NAME["llama"]
POSITIONAL = [BY_NAME[name] for name in ("llama", "gpt_neox", "falcon_new", "mpt", "opt", "gemma2")]
rows = pytest.mark.parametrize("row", LOSSY, ids=named)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("case", POSITIONAL, ids=named)
def test_positional_arguments(case: Case) -> None:
    """In the decoder's own order, which differs from family to family."""
    model = lc.patch(case.make(), LOSSY[1].method(case))
    mask = (torch.arange(30) >= torch.tensor([7, 0])[:, None]).long()
    ids = case.prompt(30, rows=2) * mask
    decoder = model.get_decoder()
    expected = decoder(input_ids=ids, attention_mask=mask).last_hidden_state
    arguments = (ids, None, mask) if case.name in ("mpt", "falcon_new") else (ids, mask)
    assert torch.equal(decoder(*arguments).last_hidden_state, expected)


def test_the_decoder_alone_can_be_patched() -> None:
    whole = lc.patch(LLAMA.make(), LOSSY[0].method(LLAMA))
    decoder = LLAMA.make().model
    ids = LLAMA.prompt(40)
    assert lc.patch(decoder, LOSSY[0].method(LLAMA)) is decoder
    assert torch.equal(decoder(ids).last_hidden_state, whole.model(ids).last_hidden_state)


@rows
def test_a_classifier_can_be_patched(row: Row) -> None:
    torch.manual_seed(0)
    model = hf.LlamaForSequenceClassification(LLAMA.make().config).eval()
    ids = LLAMA.prompt(40)
    expected = model(ids).logits
    got = lc.patch(model, row.method(LLAMA))(ids).logits
    assert error(got, expected) > TOLERANCE
    assert torch.equal(lc.unpatch(model)(ids).logits, expected)


@rows
def test_embeddings_instead_of_ids(row: Row) -> None:
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    ids = LLAMA.prompt(40)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)


def test_neither_ids_nor_embeddings() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model()
    assert model(LLAMA.prompt(5)).logits.shape == (1, 5, 128)


def test_a_call_without_a_token_changes_nothing() -> None:
    model, ids = lc.patch(LLAMA.make(), LOSSY[0].method(LLAMA)), LLAMA.prompt(30)
    with pytest.raises(ValueError, match="expected at least one token in a call"):
        model(ids[:, :0])
    out = model(ids[:, :20], use_cache=True)
    with pytest.raises(ValueError, match="expected at least one token in a call"):
        model(ids[:, :0], past_key_values=out.past_key_values)
    other = model(ids[:, :20], use_cache=True)
    rest = [model(ids[:, 20:], past_key_values=cache).logits for cache in (out.past_key_values, other.past_key_values)]
    assert torch.equal(*rest)


@rows
def test_only_some_logits(row: Row) -> None:
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    ids = LLAMA.prompt(40)
    assert error(model(ids, logits_to_keep=3).logits, model(ids).logits[:, -3:]) < TOLERANCE


@rows
def test_tuples_hidden_states_and_loss(row: Row) -> None:
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    ids = LLAMA.prompt(40)
    plain = model(ids, labels=ids, output_hidden_states=True)
    assert len(plain.hidden_states) == LLAMA.layers + 1
    loss, logits, cache, hidden = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, plain.loss)
    assert torch.equal(logits, plain.logits)
    assert isinstance(cache, lc.LongContextCache)
    assert all(torch.equal(a, b) for a, b in zip(hidden, plain.hidden_states, strict=True))


@rows
def test_without_a_cache_none_is_made(row: Row) -> None:
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    assert model(LLAMA.prompt(40), use_cache=False).past_key_values is None
    assert lc.report(model).tokens_seen == 0


def test_an_empty_dynamic_cache_is_replaced() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    given = DynamicCache(config=model.config)
    out = model(LLAMA.prompt(10), past_key_values=given)
    assert isinstance(out.past_key_values, lc.LongContextCache)
    assert given.get_seq_length() == 0


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_masks_of_any_type(dtype: torch.dtype) -> None:
    model = lc.patch(LLAMA.make(), LOSSY[0].method(LLAMA))
    mask = (torch.arange(30) >= torch.tensor([7, 0])[:, None]).long()
    ids = LLAMA.prompt(30, rows=2)
    assert torch.equal(model(ids, attention_mask=mask.to(dtype)).logits, model(ids, attention_mask=mask).logits)


# refused --------------------------------------------------------------------------------------------------------------

BLOCK = torch.ones(1, 1, 10, 10, dtype=torch.bool).tril()
PACKED = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])
REFUSALS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "4-D mask": ({"attention_mask": BLOCK}, lc.UnsupportedError, r"expected attention_mask as \[B, T\].* got a 4-D"),
    "mask per layer type": (
        {"attention_mask": {"chunked_attention": BLOCK}},
        lc.UnsupportedError,
        r"expected attention_mask as \[B, T\].* got a dict",
    ),
    "both directions": (
        {"attention_mask": {"full_attention": BLOCK | (torch.arange(10) < 4)}},
        lc.UnsupportedError,
        "expected a mask of padding, causality and the model's own windows; got one with more to it",
    ),
    "a mask that hides": (
        {"attention_mask": {"full_attention": BLOCK & (torch.eye(10) + torch.eye(10).roll(1, 0) > 0)}},
        lc.UnsupportedError,
        "got one with more to it",
    ),
    "weights": ({"output_attentions": True}, lc.UnsupportedError, "expected output_attentions=False"),
    "wide mask": ({"attention_mask": torch.ones(1, 12)}, ValueError, r"expected \[B, 10\] \(0 cached \+ 10 new"),
    "narrow mask": ({"attention_mask": torch.ones(1, 9)}, ValueError, r"expected \[B, 10\] \(0 cached \+ 10 new"),
    "unknown": ({"temperature_map": torch.ones(3)}, lc.UnsupportedError, r"got temperature_map=Tensor \[3\]"),
    "lengths": (
        {"cu_seq_lens_q": torch.tensor([0, 10])},
        lc.UnsupportedError,
        r"expected arguments that are known .* layer 0 \(LlamaAttention\); got cu_seq_lens_q=Tensor \[2\]",
    ),
    "bias": ({"position_bias": torch.ones(4, 10)}, lc.UnsupportedError, r"got position_bias=Tensor \[4, 10\]"),
    "window": ({"sliding_window": 5}, lc.UnsupportedError, "got sliding_window=5"),
    "not causal": ({"is_causal": False}, lc.UnsupportedError, "got a mask with more to it"),
}


@pytest.mark.parametrize("what", REFUSALS)
@pytest.mark.parametrize("row", [LIMITS[0], *LOSSY], ids=named)
def test_refused_by_name(row: Row, what: str) -> None:
    arguments, kind, words = REFUSALS[what]
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    with pytest.raises(kind, match=words):
        model(LLAMA.prompt(10), **arguments)
    assert torch.equal(
        model(LLAMA.prompt(10)).logits, lc.patch(LLAMA.make(), row.method(LLAMA))(LLAMA.prompt(10)).logits
    )


@pytest.mark.parametrize("what", ["4-D mask", "weights", "wide mask"])
def test_what_is_refused_at_the_door_leaves_the_cache_usable(what: str) -> None:
    arguments, kind, words = REFUSALS[what]
    model = lc.patch(LLAMA.make(), LOSSY[0].method(LLAMA))
    ids = LLAMA.prompt(20)
    cache = model(ids[:, :10]).past_key_values
    with pytest.raises(kind, match=words.split(" (")[0].split(r" \(")[0].replace("B, 10", "B, 20")):
        model(ids[:, 10:], past_key_values=cache, **arguments)
    assert error(model(ids[:, 10:], past_key_values=cache).logits, model(ids).logits[:, 10:]) < TOLERANCE


SEVERAL = tuple(BY_NAME[name] for name in ("llama", "mistral_sliding", "gemma2", "gpt_oss", "gpt2", "smollm3"))
PACKING = (LIMITS[0], *LOSSY, SELECTING[1])


@pytest.mark.parametrize(("row", "case"), pairs(PACKING, SEVERAL), ids=named)
def test_packed_texts_are_read_each_by_itself(row: Row, case: Case) -> None:
    """As transformers packs them: positions that start again, no mask, no cache."""
    model, ids = lc.patch(case.make(), row.method(case)), case.prompt(60, rows=2)
    sizes = ([20, 1, 39], [33, 27])
    at = torch.stack([torch.cat([torch.arange(size) for size in row]) for row in sizes])
    got = model(ids, position_ids=at, use_cache=False).logits
    for i, lengths in enumerate(sizes):
        alone = [model(text[None], use_cache=False).logits for text in ids[i].split(lengths)]
        assert error(got[i : i + 1], torch.cat(alone, 1)) < TOLERANCE


def test_packed_texts_are_read_as_by_the_unpatched_model() -> None:
    ids, at = LLAMA.prompt(10, rows=2), {"position_ids": PACKED, "use_cache": False}
    assert error(lc.patch(LLAMA.make(), "dense")(ids, **at).logits, LLAMA.make()(ids, **at).logits) < TOLERANCE


@rows
def test_packed_positions_beside_a_mask_or_a_cache(row: Row) -> None:
    """Positions of the text are the caller's own; positions in the cache leave no room for others."""
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    ids = LLAMA.prompt(10)
    if row.in_cache:
        with pytest.raises(lc.UnsupportedError, match="got packed sequences"):
            model(ids, position_ids=PACKED)
    else:
        wide = lc.patch(LLAMA.make(), lc.DuoAttention(pattern=gates(LLAMA), sinks=2, window=40))
        assert error(wide(ids, position_ids=PACKED).logits, LLAMA.make()(ids, position_ids=PACKED).logits) < TOLERANCE


@rows
def test_shifted_positions_change_nothing_that_rotary_positions_can_tell(row: Row) -> None:
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    ids = LLAMA.prompt(40)
    got = model(ids, position_ids=torch.arange(40)[None] + 5).logits
    assert error(got, model(ids).logits) < TOLERANCE


def test_a_cached_token_cannot_be_masked_afterwards() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    ids = LLAMA.prompt(20)
    cache = model(ids[:, :10]).past_key_values
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[0, 4] = 0
    with pytest.raises(ValueError, match="A cached token cannot be masked afterwards"):
        model(ids[:, 10:], attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("make", [lambda c: DynamicCache(), lambda c: hf.StaticCache(c, max_cache_len=64)])
def test_a_filled_foreign_cache_is_refused(make: Any) -> None:
    model = LLAMA.make()
    ids, cache = LLAMA.prompt(20), make(model.config)
    model(ids[:, :10], past_key_values=cache)
    lc.patch(model, "dense")
    with pytest.raises(TypeError, match=f"got a filled {type(cache).__name__}"):
        model(ids[:, 10:], past_key_values=cache)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("other", ["unpatched since", "never patched"])
def test_a_cache_is_refused_by_a_model_that_is_not_patched(other: str, tokens: int) -> None:
    """It would attend to the new tokens alone, and of one nobody would notice."""
    model, ids = lc.patch(LLAMA.make(), "dense"), LLAMA.prompt(20)
    expected = model(ids).logits[:, -tokens:]
    cache = model(ids[:, :-tokens]).past_key_values
    asked = lc.unpatch(model) if other == "unpatched since" else LLAMA.make()
    with pytest.raises(TypeError, match="got a call of another, or of one that was unpatched since"):
        asked(ids[:, -tokens:], past_key_values=cache)
    got = lc.patch(model, "dense")(ids[:, -tokens:], past_key_values=cache).logits
    assert error(got, expected) < TOLERANCE


def test_images_are_refused_where_positions_are_counted_in_the_cache() -> None:
    case = BY_NAME["qwen2_5_vl"]
    model = lc.patch(case.make(), LOSSY[0].method(case))
    ids = case.prompt(10)
    places = torch.arange(10).expand(3, 1, -1).clone()
    places[1, 0, 4:8] = 4  # a row of an image
    with pytest.raises(lc.UnsupportedError, match=r"got position_ids \[3, 1, 10\] of images or video"):
        model(ids, position_ids=places)
    with lc.patched(model, LIMITS[0].method(case)):
        assert error(model(ids, position_ids=places).logits, case.make()(ids, position_ids=places).logits) < TOLERANCE


# what models hand down and is honoured --------------------


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("gemma2", {"attn_logit_softcapping": 2.0}),
        ("gpt_oss", {}),
        ("granite", {}),
        ("mistral_sliding", {"sliding_window": WINDOW}),
    ],
)
def test_softcap_sinks_scale_and_windows_are_honoured(name: str, change: dict[str, Any]) -> None:
    """Values far from their defaults, so that to ignore them would show."""
    case = BY_NAME[name]
    stock, model = case.make(), case.make()
    for each in (stock, model):
        for module in each.modules():
            for key, value in change.items():
                if hasattr(module, key):
                    setattr(module, key, value)
            if getattr(module, "sinks", None) is not None:
                module.sinks.copy_(torch.linspace(-2, 4, 4))
            if name == "granite" and hasattr(module, "scaling"):
                module.scaling = 1.3
    ids = case.prompt(40)
    expected = stock(ids).logits
    assert error(lc.patch(model, "dense")(ids).logits, expected) < TOLERANCE
    assert name == "mistral_sliding" or error(case.make()(ids).logits, expected) > 1e-2


def test_a_window_that_the_configuration_does_not_have_is_refused() -> None:
    case = BY_NAME["mistral_sliding"]
    model = lc.patch(case.make(), "dense")
    for layer in model.model.layers:
        layer.self_attn.config = type(model.config)(**{**model.config.to_dict(), "sliding_window": 5})
        layer.self_attn.config._attn_implementation_internal = "hf_longctx"
        layer.self_attn.sliding_window = 5
    with pytest.raises(lc.UnsupportedError, match="got sliding_window=5"):
        model(case.prompt(20))
