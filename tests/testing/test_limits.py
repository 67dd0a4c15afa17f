"""The oracle of plans that select, clamp or quantize: dense where it must be, and against stock models elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hf_longctx as lc
from hf_longctx.cache.kv_format import Int4KV, Int8KV
from hf_longctx.cache.placement import HostLRU
from hf_longctx.cache.positions import Clamped
from hf_longctx.plan import Selector
from hf_longctx.select.budgets import Mass, TopK
from hf_longctx.select.scorers import Antidiagonal, RepresentativeDot, UpperBound
from hf_longctx.select.summaries import MinMax, Representatives
from hf_longctx.testing import Widened, oracle_logits, oracle_reads, tiny_llama

from ..select import draws

MODEL = draws.MODELS[4]
EXACT = 1e-12
DENSE = draws.plan((draws.DENSE,), (draws.DENSE,))
BOUND, DOT, TILES = UpperBound(MinMax(4, 2)), RepresentativeDot(Representatives(4, 2), 8), Antidiagonal(4, 2)
ONE = tiny_llama(
    num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=1, hidden_size=24, vocab_size=draws.VOCABULARY
).double()
"""One layer of one KV head: what a query reads decides its logits, so that a stock model can be shown just that."""


def error(got: Tensor, expected: Tensor, mask: Tensor | None) -> float:
    real = slice(None) if mask is None else mask.bool()
    return float((got - expected)[real].abs().max() / expected[real].abs().max())


def both(policy: lc.HeadPolicy) -> lc.Plan:
    return draws.plan((policy,), (policy,))


def heads(selector: Selector, far: int | None = None) -> lc.HeadPolicy:
    positions = lc.Absolute() if far is None else Clamped(far)
    phases = {phase: selector for phase in ("prefill", "decode") if phase in selector.scorer.phases}
    return lc.HeadPolicy(lc.KeepAll(), positions, **phases)


LIMITS = {
    "budget of the length, bounds": heads(Selector(BOUND, TopK(64))),
    "budget of the length, antidiagonals": heads(Selector(TILES, TopK(64))),
    "budget of the length, representatives": heads(Selector(DOT, TopK(64))),
    "all of the mass": heads(Selector(TILES, Mass(1.0))),
    "local is all": heads(Selector(BOUND, TopK(4), local=60, refresh_every=3)),
    "local is all, antidiagonals": heads(Selector(TILES, Mass(0.1), local=60)),
    "local is all, representatives": heads(Selector(DOT, TopK(4), local=60), far=59),
    "sinks are all": heads(Selector(BOUND, TopK(4), sink=57, share="q_head")),
    "far is further than the text": heads(Selector(DOT, TopK(64)), far=59),
}


@pytest.mark.parametrize("policy", LIMITS.values(), ids=LIMITS)
@settings(max_examples=5)
@given(draws.texts())
def test_dense_at_the_limits(policy: lc.HeadPolicy, text: draws.Text) -> None:
    ids, mask, calls = text
    dense = oracle_logits(MODEL, DENSE, ids, mask)
    assert error(oracle_logits(MODEL, both(policy), ids, mask, calls=calls), dense, mask) <= EXACT


@pytest.mark.parametrize(("kv", "least", "most"), [(Int8KV(), 1e-4, 0.1), (Int4KV(), 1e-2, 1.0)])
def test_few_bits_cost_something_but_not_much(kv: object, least: float, most: float) -> None:
    ids = draws.tokens(2, 40)
    dense = oracle_logits(MODEL, DENSE, ids)
    plan = both(replace(draws.DENSE, kv=kv))
    assert least < error(oracle_logits(MODEL, plan, ids), dense, None) < most
    assert torch.equal(oracle_logits(MODEL, plan, ids, calls=[7] * 5 + [1] * 5), oracle_logits(MODEL, plan, ids))


def test_values_are_stored_in_few_bits_too() -> None:
    model, ids = draws.model(1), draws.tokens(1, 20)
    for layer in model.model.layers:
        layer.self_attn.k_proj.weight.data.zero_()  # keys of zero lose nothing
    dense, few = (oracle_logits(model, both(replace(draws.DENSE, kv=kv)), ids) for kv in (None, Int4KV()))
    assert error(few, dense, None) > 1e-3


def test_keys_are_stored_at_small_positions_where_the_plan_has_them() -> None:
    """A bare window has the same distances in text and cache: only what is lost in few bits tells them apart."""
    window, ids = 9, draws.tokens(1, 30)

    def logits(positions: object, kv: object, length: int) -> Tensor:
        return oracle_logits(MODEL, both(lc.HeadPolicy(lc.SinkWindow(0, window), positions, kv=kv)), ids[:, :length])

    for kv, length, alike in ((None, 30, True), (Int4KV(), window, True), (Int4KV(), 30, False)):
        apart = error(*(logits(positions, kv, length) for positions in (lc.InCache(), lc.Absolute())), None)
        assert (apart <= EXACT) if alike else (1e-4 < apart < 1)


def test_placement_changes_nothing() -> None:
    ids, calls = draws.tokens(1, 40), [20, *[1] * 20]
    policy = heads(Selector(BOUND, TopK(8)))
    placed = replace(policy, placement=HostLRU(8))
    assert torch.equal(*(oracle_logits(MODEL, both(p), ids, calls=calls) for p in (policy, placed)))


@pytest.mark.parametrize("far", [1, 5, 28])
def test_clamped_keys_are_read_as_if_the_text_had_stood_still(far: int) -> None:
    """The last token of a prefix, whose far tokens the stock model is told stand at just that distance."""
    ids = draws.tokens(1, 30)
    got = oracle_logits(ONE, one(lc.HeadPolicy(lc.KeepAll(), Clamped(far))), ids)
    for last in range(30):
        place = (torch.arange(last + 1)).clamp(min=last - far)
        expected = stock(ids[:, : last + 1], place)
        torch.testing.assert_close(got[0, last], expected, rtol=0, atol=EXACT * float(expected.abs().max()))


@settings(max_examples=15)
@given(st.data(), st.sampled_from(["bounds", "tiles", "near", "far"]))
def test_what_is_read_is_all_that_counts(data: st.DataObject, kind: str) -> None:
    """The stock model is shown only the tokens that each query reads, at their distances."""
    ids, mask, calls = data.draw(draws.texts())
    selector, far = {
        "bounds": (data.draw(draws.upper_bounds(refresh_every=2)), None),
        "tiles": (replace(data.draw(draws.antidiagonals(kv_heads=1)), budget=Mass(0.5)), None),
        "near": (data.draw(draws.representatives()), None),
        "far": (data.draw(draws.representatives()), 5),
    }[kind]
    plan = one(heads(replace(selector, share="all"), far))
    got = oracle_logits(ONE, plan, ids, mask, calls=calls)
    (reads,) = oracle_reads(ONE, plan, ids, mask, calls=calls)
    for row, query in zip(*torch.where(torch.ones_like(ids) if mask is None else mask), strict=True):
        columns = reads[row, 0, query].nonzero()[:, 0]
        before = 0 if mask is None else int((mask[row] == 0).sum())
        place = columns - before
        place = place if far is None else place.clamp(min=int(query) - before - far)
        expected = stock(ids[row, columns][None], place)
        torch.testing.assert_close(got[row, query], expected, rtol=0, atol=EXACT * float(expected.abs().max()))


def one(policy: lc.HeadPolicy) -> lc.Plan:
    return lc.Plan("one", (lc.LayerPlan((lc.HeadGroup((0,), policy),)),))


@torch.no_grad()
def stock(ids: Tensor, place: Tensor) -> Tensor:
    """Logits of the last token of the unpatched model, tokens at the positions given, in float64 all through."""
    everything = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    with Widened(torch.float64):
        return ONE(ids, attention_mask=everything, position_ids=place[None], use_cache=False).logits[0, -1]


@settings(max_examples=20)
@given(st.data(), st.sampled_from(["kv_head", "all"]))
def test_a_budget_bounds_what_is_read(data: st.DataObject, share: str) -> None:
    """Forced blocks and no more than the budget beside them; every query reads itself and nothing that comes later."""
    ids, mask, calls = data.draw(draws.texts())
    selector = replace(data.draw(draws.representatives()), share=share, refresh_every=1)
    block, most = selector.block, selector.budget.tokens
    for reads in oracle_reads(MODEL, both(heads(selector, far=3)), ids, mask, calls=calls):
        before = torch.zeros(len(ids), dtype=torch.int64) if mask is None else (mask == 0).sum(1)
        for row in range(len(ids)):
            own = reads[row, :, before[row] :, before[row] :]
            assert int(reads[row].sum()) == int(own.sum())
            n = torch.arange(own.shape[-1])
            assert not own[:, n[:, None] < n].any()
            assert bool(own[:, n, n].all())
            near = (n[:, None] - n < selector.local) & (n <= n[:, None])
            assert bool(own[:, near].all())
            forced = -(-selector.sink // block) * block + selector.local + selector.scorer.q_block + 2 * block
            assert int(own.sum(-1).max()) <= forced + most
            groups = {"q_head": 8, "kv_head": 2, "all": 1}[share]
            alike = own.view(groups, -1, *own.shape[1:])
            assert bool((alike == alike[:, :1]).all())
