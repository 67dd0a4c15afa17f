"""StreamingLLM against the oracle: random chunks, sinks, windows, padding and groups; every rotary type and family."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_longctx as lc
from hf_longctx.models import inspect_model
from hf_longctx.testing import feed, oracle_logits, tiny_llama

from ..integration.cases import BY_NAME, ORIGINAL, Case
from . import draws

HEADS = {groups: tiny_llama(num_key_value_heads=4 // groups) for groups in (1, 2, 4)}

ROTARY = [
    "llama_linear",
    "llama_dynamic",
    "llama_llama3",
    "llama_yarn",
    "llama_longrope",
    "phi3_longrope",
    "phi3_partial",
    "gpt_neox",
    "stablelm",
    "glm",
    "cohere",
    "smollm3",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "qwen3",
    "qwen3_moe",
    "granite",
    "olmo2",
    "qwen2_5_vl",
]
"""Scaled, partial, interleaved, absent in some layers; then softcap, hybrid layers, learned sinks, norms, experts."""


def plan_of(model: torch.nn.Module, sinks: int, window: int) -> lc.Plan:
    return lc.StreamingLLM(sinks=sinks, window=window).plan(inspect_model(model))  # type: ignore[arg-type]


@st.composite
def streams(draw: st.DrawFn) -> tuple[torch.Tensor | None, torch.Tensor, list[int]]:
    """Mask, token ids and calls."""
    total = draw(st.integers(1, 80))
    mask = draw(draws.padding(total))
    ids = draws.tokens(1 if mask is None else len(mask), total, draw(st.integers(0, 9)))
    return mask, ids, draw(draws.calls(total))


@settings(max_examples=60)
@given(streams(), st.sampled_from([1, 2, 4]), st.integers(0, 5), st.integers(1, 20))
def test_any_chunking_equals_the_oracle(
    stream: tuple[torch.Tensor | None, torch.Tensor, list[int]], groups: int, sinks: int, window: int
) -> None:
    mask, ids, calls = stream
    model = HEADS[groups]
    plan = plan_of(model, sinks, window)
    oracle = oracle_logits(model, plan, ids, mask)
    with lc.patched(model, plan):
        got, cache = feed(model, ids, calls, mask)
    draws.assert_equal(model, got, oracle, sinks + window, mask)
    assert all(store.k.shape[2] <= sinks + window for stack in cache.layers for _, store in stack.stores)


@settings(max_examples=15)
@given(streams(), st.integers(0, 5), st.integers(1, 20))
def test_without_a_cache_too(
    stream: tuple[torch.Tensor | None, torch.Tensor, list[int]], sinks: int, window: int
) -> None:
    mask, ids, _ = stream
    model = HEADS[2]
    plan = plan_of(model, sinks, window)
    oracle = oracle_logits(model, plan, ids, mask)
    with lc.patched(model, plan), torch.no_grad():
        got = model(ids, attention_mask=mask, use_cache=False).logits
    draws.assert_equal(model, got, oracle, sinks + window, mask)


@pytest.mark.parametrize("calls", [[60], [1] * 60, [5, 1, 20, 2, 1, 1, 30]], ids=["prompt", "steps", "chunks"])
@pytest.mark.parametrize("case", [BY_NAME[name] for name in ROTARY], ids=ROTARY)
def test_every_rotary_type(case: Case, calls: list[int]) -> None:
    model, ids = case.make(), case.prompt(60, rows=2)
    mask = (torch.arange(60) >= torch.tensor([0, 9])[:, None]).long()
    sinks, window = 3, 11  # longrope and dynamic types change frequencies beyond ORIGINAL tokens: stay within
    assert sinks + window <= ORIGINAL
    plan = plan_of(model, sinks, window)
    oracle = oracle_logits(model, plan, ids, mask)
    with lc.patched(model, plan):
        got, _ = feed(model, ids, calls, mask)
    draws.assert_equal(model, got, oracle, sinks + window, mask)


@pytest.mark.parametrize("name", ["falcon_new", "falcon_multi_query", "falcon_multi_head", "falcon_alibi"])
def test_falcon_agrees_with_itself(name: str) -> None:
    """Falcon attends by itself, out of the oracle's reach; rotations and masks are those of the families above."""
    case = BY_NAME[name]
    model, ids = case.make(), case.prompt(60, rows=2)
    mask = (torch.arange(60) >= torch.tensor([0, 9])[:, None]).long()
    with lc.patched(model, lc.StreamingLLM(sinks=3, window=11)), torch.no_grad():
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        short = model(ids[1:, 9:14], use_cache=False).logits
        for calls in ([60], [1] * 60, [5, 1, 20, 2, 1, 1, 30]):
            draws.assert_equal(model, feed(model, ids, calls, mask)[0], whole.double(), 14, mask)
    with torch.no_grad():
        stock = model(ids[1:, 9:14], use_cache=False).logits
    draws.assert_equal(model, short, stock.double(), 5)


@pytest.mark.parametrize(("sinks", "window"), [(2, 11), (3, 10), (3, 12)])
def test_the_oracle_tells_neighbouring_knobs_apart(sinks: int, window: int) -> None:
    model, ids = HEADS[2], draws.tokens(1, 60, seed=0)
    oracle = oracle_logits(model, plan_of(model, 3, 11), ids)
    with lc.patched(model, lc.StreamingLLM(sinks=sinks, window=window)):
        got, _ = feed(model, ids, [60])
    with pytest.raises(AssertionError, match="relative error"):
        draws.assert_equal(model, got, oracle, 14)


def test_positions_of_the_text_are_not_positions_in_the_cache() -> None:
    model, ids = HEADS[2], draws.tokens(1, 60, seed=0)
    oracle = oracle_logits(model, plan_of(model, 3, 11), ids)
    group = lc.HeadGroup((0, 1), lc.HeadPolicy(lc.SinkWindow(3, 11), lc.Absolute()))
    with lc.patched(model, lc.Plan("text positions", (lc.LayerPlan((group,)),) * 2)):
        got, _ = feed(model, ids, [60])
    with pytest.raises(AssertionError, match="relative error"):
        draws.assert_equal(model, got, oracle, 14)
