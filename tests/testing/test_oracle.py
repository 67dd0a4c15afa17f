"""The oracle itself: against the paper's worked example, masks written as formulas, and stock models."""

from __future__ import annotations

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_longctx as lc
from hf_longctx.models import inspect_model
from hf_longctx.testing import key_positions, masks, oracle_logits, rounding, tiny_llama

from ..integration.cases import BY_NAME

IDS = torch.randint(8, 64, (2, 30), generator=torch.Generator().manual_seed(0))


def test_the_papers_example() -> None:
    """Figure 4: with tokens 0 1 2 3 6 7 8 in the cache, the ninth is decoded at positions 0 to 7."""
    places = key_positions(lc.HeadPolicy(lc.SinkWindow(4, 4), lc.InCache()), [9, 1])[9]
    assert places.tolist() == [0, 1, 2, 3, -1, -1, 4, 5, 6, 7]


def test_positions_of_the_text_stay() -> None:
    places = key_positions(lc.HeadPolicy(lc.SinkWindow(2, 3), lc.Absolute()), [9])[8]
    assert places.tolist() == [0, 1, -1, -1, -1, -1, 6, 7, 8]


def test_padding_is_no_token() -> None:
    real = torch.tensor([0, 0, 1, 1, 0, 1, 1, 1, 1])
    places = key_positions(lc.HeadPolicy(lc.SinkWindow(1, 2), lc.InCache()), [4, 5], real)
    assert places[8].tolist() == [-1, -1, 0, -1, -1, -1, -1, 1, 2]
    assert places[4].tolist() == [-1] * 9


def test_masks_as_formulas() -> None:
    groups = (
        lc.HeadGroup((1,), lc.HeadPolicy(lc.SinkWindow(2, 3), lc.Absolute())),
        lc.HeadGroup((0,), lc.HeadPolicy(lc.KeepAll(), lc.Absolute())),
    )
    (seen,) = masks(lc.Plan("split", (lc.LayerPlan(groups),)), [5, 1, 1, 6])
    i, j = torch.arange(13)[:, None], torch.arange(13)[None]
    assert torch.equal(seen[0], j <= i)
    assert torch.equal(seen[1], (j <= i) & ((i - j < 3) | (j < 2)))


@pytest.mark.parametrize("name", ["llama", "llama_yarn", "gemma3", "gpt_neox", "cohere", "smollm3", "gpt_oss"])
def test_dense_is_the_stock_model(name: str) -> None:
    model, ids = BY_NAME[name].make(), BY_NAME[name].prompt(30, rows=2)
    oracle = oracle_logits(model, lc.Dense().plan(inspect_model(model)), ids)
    with torch.no_grad():
        stock = model(ids, use_cache=False).logits
    assert oracle.dtype == torch.float64
    assert float((oracle - stock).abs().max() / oracle.abs().max()) <= rounding(model, 30)


def test_it_is_exact_to_float64() -> None:
    """Norms and softmax included: moving all the arithmetic to another order changes the last digits only."""
    model = tiny_llama()
    plan = lc.Dense().plan(inspect_model(model))
    whole = oracle_logits(model, plan, IDS)
    rows = torch.cat([oracle_logits(model, plan, row[None]) for row in IDS])
    padded = torch.cat((torch.zeros_like(IDS[:, :7]), IDS), 1)
    mask = (torch.arange(37) >= 7).long().expand(2, -1)
    moved = oracle_logits(model, plan, padded, mask)[:, 7:]
    allowed = rounding(model, 30, torch.float64) * float(whole.abs().max())
    for other in (rows, moved):
        torch.testing.assert_close(other, whole, atol=allowed, rtol=0)


def test_it_leaves_the_model_and_transformers_alone() -> None:
    model = tiny_llama()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    kept, name = set(ALL_ATTENTION_FUNCTIONS), model.config._attn_implementation
    oracle_logits(model, lc.Dense().plan(inspect_model(model)), IDS)
    assert set(ALL_ATTENTION_FUNCTIONS) == kept
    assert model.config._attn_implementation == name
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())


def test_a_patched_model_is_refused() -> None:
    model = tiny_llama()
    plan = lc.Dense().plan(inspect_model(model))
    with lc.patched(model, plan), pytest.raises(ValueError, match="expected an unpatched model; got a patched one"):
        oracle_logits(model, plan, IDS)


def test_the_same_seed_gives_the_same_model() -> None:
    same, other = tiny_llama(seed=1).state_dict(), tiny_llama(seed=1).state_dict()
    assert all(torch.equal(a, b) for a, b in zip(same.values(), other.values(), strict=True))
