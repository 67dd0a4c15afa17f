"""Where the tokens of a call stand, with padding anywhere: against counting, column by column."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_longctx.cache.step import Step

CPU = torch.device("cpu")


@st.composite
def texts(draw: st.DrawFn) -> tuple[Tensor, int]:
    """`[B, C]` real tokens with holes anywhere, and the columns that came before the call."""
    rows, total = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    flags = st.lists(st.booleans(), min_size=total, max_size=total)
    return torch.tensor([draw(flags) for _ in range(rows)]), draw(st.integers(0, total - 1))


def step_of(real: Tensor, columns: int) -> Step:
    """The step of the columns from `columns` on."""
    before = real[:, :columns]
    lengths = None if bool(before.all()) else before.sum(1)
    return Step.of(columns, real.shape[1] - columns, CPU, lengths, real.long())


@settings(max_examples=200)
@given(texts())
def test_every_token_stands_where_counting_puts_it(text: tuple[Tensor, int]) -> None:
    real, columns = text
    step = step_of(real, columns)
    rows, tokens = real.shape[0], step.tokens
    expected = torch.tensor(
        [[int(row[:c].sum()) if row[c] else -1 for c in range(columns, columns + tokens)] for row in real]
    )
    in_call = step.pos_in_text.expand(rows, -1)
    assert torch.equal(in_call[real[:, columns:]], expected[real[:, columns:]])
    assert bool((in_call[~real[:, columns:]] >= 0).all())  # padding has a harmless position
    order = torch.arange(tokens).expand(rows, -1) if step.order is None else step.order
    assert torch.equal(step.pos.expand(rows, -1), expected.gather(1, order))
    assert torch.equal(step.lengths_after.expand(rows), real.sum(1))


@settings(max_examples=200)
@given(texts())
def test_real_tokens_come_first_and_go_back_to_their_columns(text: tuple[Tensor, int]) -> None:
    real, columns = text
    step = step_of(real, columns)
    pos = step.pos.tolist()
    assert all(row == sorted(p for p in row if p >= 0) + [-1] * row.count(-1) for row in pos)
    if step.order is not None:
        assert step.restore is not None
        there = torch.arange(step.tokens).expand(real.shape[0], -1)
        assert torch.equal(there.gather(1, step.order).gather(1, step.restore), there)
    counts = real[:, columns:].sum(1).tolist()
    firsts = real[:, :columns].sum(1).tolist()
    assert step.spans * (len(counts) // len(step.spans)) == list(zip(firsts, counts, strict=True))


@settings(max_examples=200)
@given(texts(), st.integers(1, 4))
def test_parts_of_a_call_are_the_call(text: tuple[Tensor, int], size: int) -> None:
    step = step_of(*text)
    steps = [step.part(first, min(first + size, step.tokens)) for first in range(0, step.tokens, size)]
    assert torch.equal(torch.cat([part.pos for part in steps], 1), step.pos)
    assert [part.columns for part in steps] == list(range(step.columns, step.columns + step.tokens, size))
    assert torch.equal(steps[0].lengths, step.lengths)
    assert all(torch.equal(one.lengths_after, two.lengths) for one, two in pairwise(steps))
    assert torch.equal(steps[-1].lengths_after, step.lengths_after)
    assert all(part.ragged == step.ragged for part in steps)


@settings(max_examples=200)
@given(st.data())
def test_tails_are_what_came_since_the_last_padding(data: st.DataObject) -> None:
    real, _ = data.draw(texts())
    total, tail, start = real.shape[1], None, 0
    while start < total:
        size = data.draw(st.integers(1, total - start))
        tail = step_of(real[:, : start + size], start).tail_after(tail)
        start += size
    expected = torch.tensor([row[::-1].index(False) if False in row else total for row in real.tolist()])
    assert torch.equal(torch.full((len(real),), total) if tail is None else tail, expected)


def test_without_padding_rows_are_alike() -> None:
    for mask in (None, torch.ones(3, 9)):
        step = Step.of(4, 5, CPU, None, mask)
        assert not step.ragged
        assert step.order is None
        assert step.pos.tolist() == [[4, 5, 6, 7, 8]]
        assert step.spans == [(4, 5)]


def test_a_mask_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[B, 7\] \(4 cached \+ 3 new columns\); got \[2, 3\]"):
        Step.of(4, 3, CPU, None, torch.ones(2, 3))


@pytest.mark.parametrize("lengths", [None, torch.tensor([4, 2])])
def test_a_cached_token_cannot_be_masked_afterwards(lengths: Tensor | None) -> None:
    mask = torch.ones(2, 7)
    mask[1, :3] = 0
    with pytest.raises(ValueError, match="A cached token cannot be masked afterwards"):
        Step.of(4, 3, CPU, lengths, mask)


def test_on_another_device_it_is_the_same_step() -> None:
    step = Step.of(0, 3, CPU, None, torch.tensor([[0, 1, 1], [1, 1, 1]]))
    assert step.on(CPU) is step
    moved = step.on(torch.device("meta"))
    assert moved is step.on(torch.device("meta"))
    assert moved.lengths.device.type == "meta"
    assert moved.pos.shape == step.pos.shape
