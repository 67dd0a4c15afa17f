"""Every method at the knobs where it says it is dense, against the unpatched model, on every family and rotary type."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_longctx as lc

from ..integration.cases import ORIGINAL
from ..integration.tiny import Case
from .cases import LIMITS, Row, changes_with_length, named, pairs

NEW = 8
TOLERANCE = 1e-5
"""Largest difference of two logits, as a share of the largest logit: some tens of float32 roundings."""

for_each = pytest.mark.parametrize(("row", "case"), pairs(LIMITS), ids=named)


def _calls(size: int | None) -> Callable[[Any, Tensor], Tensor]:
    """Feed the text in calls of `size` tokens to one cache; None: in one call."""

    def run(model: Any, ids: Tensor) -> Tensor:
        parts, past = [], None
        for part in ids.split(size or ids.shape[1], dim=1):
            out = model(part, past_key_values=past, use_cache=True)
            past = out.past_key_values
            parts.append(out.logits)
        return torch.cat(parts, 1)

    return run


WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "no_cache": lambda model, ids: model(ids, use_cache=False).logits,
    "one_call": _calls(None),
    "chunks": _calls(7),
    "steps": _calls(1),
}


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    assert got.shape == expected.shape
    return float((got - expected).detach().abs().max() / expected.detach().abs().max())


@cache
@torch.no_grad()
def stock_logits(case: Case, way: str, tokens: int) -> Tensor:
    """Logits of a fresh unpatched model."""
    return WAYS[way](case.make(), case.prompt(tokens))


def greedy(model: Any, ids: Tensor, mask: Tensor | None = None) -> Any:
    """Greedy tokens with the logits that they were taken from `[N, B, V]`."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(ids, attention_mask=mask, **options)
    return out.sequences, torch.stack(out.logits)


def padded(case: Case, tokens: int) -> tuple[Tensor, Tensor, list[int]]:
    """Three rows of different lengths, padded on the left: ids, mask and lengths."""
    lengths = [tokens - 9, tokens, tokens // 2]
    mask = (torch.arange(tokens) >= tokens - torch.tensor(lengths)[:, None]).long()
    return case.prompt(tokens, rows=3) * mask, mask, lengths


@pytest.mark.parametrize("way", WAYS)
@for_each
@torch.no_grad()
def test_logits_are_those_of_the_unpatched_model(row: Row, case: Case, way: str) -> None:
    tokens = row.tokens(case)
    model = lc.patch(case.make(), row.method(case))
    assert error(WAYS[way](model, case.prompt(tokens)), stock_logits(case, way, tokens)) < TOLERANCE


@for_each
def test_greedy_tokens_are_those_of_the_unpatched_model(row: Row, case: Case) -> None:
    ids = case.prompt(row.tokens(case) - NEW)
    expected, _ = greedy(case.make(), ids)
    got, _ = greedy(lc.patch(case.make(), row.method(case)), ids)
    assert torch.equal(got, expected)


@for_each
def test_a_left_padded_batch_gives_what_the_unpatched_model_gives(row: Row, case: Case) -> None:
    ids, mask, _ = padded(case, row.tokens(case) - NEW)
    expected, expected_logits = greedy(case.make(), ids, mask)
    got, logits = greedy(lc.patch(case.make(), row.method(case)), ids, mask)
    assert torch.equal(got, expected)
    assert error(logits, expected_logits) < TOLERANCE


ROWS_APART = [
    (row, case) for row, case in pairs(LIMITS) if row.tokens(case) <= ORIGINAL or not changes_with_length(case)
]
"""Beyond the original length, dynamic and longrope frequencies follow the longest row: no stock batch is its rows."""


@pytest.mark.parametrize(("row", "case"), ROWS_APART, ids=named)
def test_a_left_padded_batch_gives_what_single_rows_give(row: Row, case: Case) -> None:
    ids, mask, lengths = padded(case, row.tokens(case) - NEW)
    model = lc.patch(case.make(), row.method(case))
    batch, batch_logits = greedy(model, ids, mask)
    for i, length in enumerate(lengths):
        single, logits = greedy(model, ids[i : i + 1, -length:])
        assert torch.equal(batch[i : i + 1, -length - NEW :], single)
        assert error(batch_logits[:, i : i + 1], logits) < TOLERANCE


@for_each
@torch.no_grad()
def test_right_padding_is_not_seen(row: Row, case: Case) -> None:
    tokens = row.tokens(case)
    ids, short = case.prompt(tokens, rows=2), tokens // 2 - 3
    mask = (torch.arange(tokens) < torch.tensor([tokens, short])[:, None]).long()
    model = lc.patch(case.make(), row.method(case))
    logits = model(ids, attention_mask=mask).logits
    expected = case.make()(ids, attention_mask=mask).logits
    assert error(logits[0], expected[0]) < TOLERANCE
    assert error(logits[1, :short], expected[1, :short]) < TOLERANCE
