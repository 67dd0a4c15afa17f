"""What a method cannot do: `supports` and `patch` say so by name, and nothing is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_longctx as lc
from hf_longctx.methods import METHODS

from ..integration.cases import BY_NAME, ORIGINAL, REFUSED
from ..integration.snapshot import differences, snapshot
from ..integration.tiny import Case
from .cases import DECODERS, LIMITS, LOSSY, SELECTING, Row, changes_with_length, named

WHY = {
    "bert": "'bert', which has attention that is not causal",
    "t5": "'t5', which is an encoder-decoder",
    "deepseek_v3": "'deepseek_v3', which has multi-latent attention",
    "diffllama": "'diffllama', which attends twice in each layer",
    "mamba": "'mamba', which has layers of type linear_attention",
    "llama4": "'llama4_text', which has layers of type chunked_attention",
    "bloom": "'bloom', which does not let its attention function be chosen, and has no adapter here",
}
"""By model, why no method takes it."""


def reason(row: Row, case: Case) -> str:
    """What the refusal must say."""
    if case.refused is not None:
        return WHY[case.name]
    if case.positions == "learned":
        return f"'{case.name}': its positions are learned or absent, not rotary"
    return f"'mistral' with a sliding window of 16 in all {case.layers} layers"


def assert_refused(case: Case, method: Any, words: str) -> None:
    """`patch` raises with these words, and the model is as it was."""
    model = case.make()
    before = snapshot(model)
    with pytest.raises(lc.UnsupportedError) as caught:
        lc.patch(model, method)
    assert words in str(caught.value)
    assert differences(before, snapshot(model)) == []


REFUSALS = [(row, case) for row in LIMITS for case in (*DECODERS, *REFUSED) if not row.takes(case)]


def test_there_are_refusals_of_every_kind() -> None:
    assert {case.name for _, case in REFUSALS} == {*WHY, "mistral_sliding", "gpt2", "opt"}


@pytest.mark.parametrize(("row", "case"), REFUSALS, ids=named)
def test_refused_by_name_and_nothing_changed(row: Row, case: Case) -> None:
    assert_refused(case, row.method(case), reason(row, case))


@pytest.mark.parametrize("case", REFUSED, ids=named)
@torch.no_grad()
def test_a_refused_model_computes_what_it_did(case: Case) -> None:
    inputs = {"input_ids": case.prompt(20)}
    if case.name == "t5":
        inputs["decoder_input_ids"] = case.prompt(5)
    model = case.make()
    expected = model(**inputs).logits
    with pytest.raises(lc.UnsupportedError):
        lc.patch(model, "dense")
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_supports_gives_the_same_reason(case: Case) -> None:
    model = case.make()
    before = snapshot(model)
    rows = lc.supports(model)
    assert [row.method for row in rows] == list(METHODS)
    assert not any(row.ok for row in rows)
    assert all(WHY[case.name] in row.reason for row in rows)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("case", DECODERS, ids=named)
def test_supports_agrees_with_patch(case: Case) -> None:
    model = case.make()
    for row in lc.supports(model):
        if row.ok:
            lc.unpatch(lc.patch(model, row.method))
            assert str(row) == f"{row.method}: yes"
        else:
            with pytest.raises(lc.UnsupportedError) as caught:
                lc.patch(model, row.method)
            assert str(caught.value) == row.reason
            assert str(row) == f"{row.method}: no. {row.reason}"


@pytest.mark.parametrize("case", [BY_NAME["llama"], BY_NAME["mpt"], BY_NAME["qwen3_vl"]], ids=named)
def test_supports_of_a_patched_model_is_the_same(case: Case) -> None:
    model = case.make()
    before = lc.supports(model)
    assert lc.supports(lc.patch(model, "dense")) == before


def test_duo_attention_without_a_pattern_asks_for_one() -> None:
    assert_refused(BY_NAME["llama"], lc.DuoAttention(), "Pass pattern= with a folder in the published format")


@pytest.mark.parametrize("case", [case for case in DECODERS if changes_with_length(case)], ids=named)
def test_streams_stay_where_frequencies_do_not_change(case: Case) -> None:
    words = f"expected sinks + window <= {ORIGINAL} for '{case.make().config.model_type}'"
    assert_refused(case, lc.StreamingLLM(sinks=4, window=ORIGINAL - 3), words)
    lc.patch(case.make(), lc.StreamingLLM(sinks=4, window=ORIGINAL - 4))


@pytest.mark.parametrize("row", [*LOSSY, *SELECTING], ids=named)
def test_every_method_drops_tokens_somewhere(row: Row) -> None:
    """The tables are what they say: a lossy row really changes the logits, of the prompt or of a decode step."""
    case = BY_NAME["llama"]
    ids = case.prompt(60)
    with torch.no_grad():
        expected = case.make()(ids).logits[:, -2:]
        model = lc.patch(case.make(), row.method(case))
        prompt = model(ids[:, :-1], use_cache=True)
        step = model(ids[:, -1:], past_key_values=prompt.past_key_values)
        got = torch.cat((prompt.logits[:, -1:], step.logits), 1)
    assert (got - expected).abs().max() > 0.1 * expected.abs().max()
