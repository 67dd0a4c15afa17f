"""Plans that split the heads of a layer, as DuoAttention does: against the oracle's masks."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_longctx as lc
from hf_longctx.models import inspect_model
from hf_longctx.testing import feed, masks, oracle_logits, tiny_llama

from . import draws

MODEL = tiny_llama(num_attention_heads=8, num_key_value_heads=4)
DENSE = lc.HeadPolicy(lc.KeepAll(), lc.Absolute())


@st.composite
def plans(draw: st.DrawFn) -> lc.Plan:
    """Two layers whose four KV heads are dealt to up to three policies."""
    layers = []
    for _ in range(2):
        policies = [
            DENSE,
            *(
                lc.HeadPolicy(lc.SinkWindow(draw(st.integers(0, 4)), draw(st.integers(1, 16))), lc.Absolute())
                for _ in range(2)
            ),
        ]
        dealt = draw(st.lists(st.integers(0, 2), min_size=4, max_size=4))
        groups = [(tuple(h for h in range(4) if dealt[h] == i), policy) for i, policy in enumerate(policies)]
        layers.append(lc.LayerPlan(tuple(lc.HeadGroup(heads, policy) for heads, policy in groups if heads)))
    return lc.Plan("split", tuple(layers))


@pytest.mark.parametrize("backend", ["", "reference"], ids=["automatic", "reference"])
@settings(max_examples=30)
@given(plans(), st.data())
def test_any_split_equals_the_oracle(backend: str, plan: lc.Plan, data: st.DataObject) -> None:
    with lc.use_backend(backend) if backend else nullcontext():
        compare(plan, data)


def compare(plan: lc.Plan, data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 60))
    mask = data.draw(draws.padding(total))
    ids = draws.tokens(1 if mask is None else len(mask), total, seed=0)
    oracle = oracle_logits(MODEL, plan, ids, mask)
    with lc.patched(MODEL, plan):
        got, _ = feed(MODEL, ids, data.draw(draws.calls(total)), mask)
    draws.assert_equal(MODEL, got, oracle, total, mask)


@settings(max_examples=30)
@given(st.data())
def test_heads_of_one_cache_may_have_windows_of_any_size(data: st.DataObject) -> None:
    """Positions in the cache, each head's own; a bare window may as well be counted in the text."""
    sizes = st.builds(lc.SinkWindow, st.integers(0, 5), st.integers(1, 20))
    first, second, third = (data.draw(sizes) for _ in range(3))
    layers = [
        lc.LayerPlan(
            (
                lc.HeadGroup((0, 3), lc.HeadPolicy(keep, lc.InCache())),
                lc.HeadGroup((1, 2), lc.HeadPolicy(other, lc.InCache() if other.sink else lc.Absolute())),
            )
        )
        for keep, other in ((first, second), (third, first))
    ]
    compare(lc.Plan("sizes", tuple(layers)), data)


GATES = [[0.9, 0.1, 0.8, 0.2], [0.3, 0.7, 0.4, 0.6]]


def test_gates_choose_the_heads_that_stream() -> None:
    method = lc.DuoAttention(pattern=GATES, sparsity=0.5, sinks=3, window=5)
    first, second = masks(method.plan(inspect_model(MODEL)), [40])
    causal = torch.ones(40, 40).tril().bool()
    i, j = torch.arange(40)[:, None], torch.arange(40)[None]
    lamb = causal & ((j < 3) | (i - j < 5))
    for seen, retrieval in ((first, (0, 2)), (second, (1, 3))):
        for head in range(4):
            assert torch.equal(seen[head], causal if head in retrieval else lamb)


@pytest.mark.parametrize("calls", [[80], [1] * 80, [30, 1, 49]], ids=["prompt", "steps", "chunks"])
def test_all_retrieval_is_dense(calls: list[int]) -> None:
    ids = draws.tokens(2, 80, seed=0)
    with lc.patched(MODEL, "dense"):
        dense, cache = feed(MODEL, ids, calls)
    with lc.patched(MODEL, lc.DuoAttention(pattern=GATES, sparsity=0.0, sinks=3, window=5)):
        got, other = feed(MODEL, ids, calls)
    assert torch.equal(got, dense)
    assert other.kv_bytes == cache.kv_bytes
