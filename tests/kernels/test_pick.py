"""Picking blocks: by definition, with ties, with shares of attention; ids ascend, are unique and in range."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_longctx.kernels import ops
from hf_longctx.kernels.reference import pick

MANY = settings(max_examples=120)


@dataclass(frozen=True)
class Choice:
    """Arguments of `pick_blocks`; scores are whole multiples of 1/16, so that sums are exact and many are equal."""

    scores: Tensor
    low: Tensor
    high: Tensor
    sink: int
    take: int | None
    tau: Tensor | None
    forced: int

    def picked(self, row: int, head: int, n: int) -> list[int]:
        """What the operation is defined to pick."""
        high = int(self.high[row % len(self.high), n])
        low = int(self.low[row % len(self.low), n])
        scores = [-math.inf if math.isnan(s) else s for s in self.scores[row, head, n].tolist()]
        forced = [j for j in range(high + 1) if j < self.sink or low <= j]
        ranked = sorted((j for j in range(self.sink, min(low, high + 1))), key=lambda j: (-scores[j], j))
        if self.take is not None:
            return sorted(forced + ranked[: self.take])
        assert self.tau is not None
        share, held = float(self.tau[head]), sum(scores[j] for j in forced)
        total, best = sum(scores[: high + 1]), []
        for j in ranked:
            if share >= 1 or held < share * total:
                best.append(j)
            held += scores[j]
        return sorted(forced + best)


@st.composite
def choices(draw: st.DrawFn, by_share: bool) -> Choice:
    rows, heads, count, blocks = (draw(st.integers(1, n)) for n in (3, 4, 4, 12))
    least = 0 if by_share else -9
    values = st.integers(least, 9).map(lambda x: x / 16)
    if not by_share:
        values = st.one_of(values, st.sampled_from([math.nan, -math.inf]))
    size = rows * heads * count * blocks
    scores = torch.tensor(draw(st.lists(values, min_size=size, max_size=size)), dtype=torch.float32)
    places = draw(st.sampled_from([1, rows]))
    high = torch.tensor([[draw(st.integers(-1, blocks - 1)) for _ in range(count)] for _ in range(places)])
    local = torch.tensor([[draw(st.integers(1, 4)) for _ in range(count)] for _ in range(places)])
    low = (high - local + 1).clamp(min=0)
    take = None if by_share else draw(st.integers(0, 6))
    tau = torch.tensor([draw(st.sampled_from([0.25, 0.5, 0.875, 1.0])) for _ in range(heads)]) if by_share else None
    shape = (rows, heads, count, blocks)
    return Choice(scores.view(shape), low, high, draw(st.integers(0, 3)), take, tau, int(local.max()))


def run(choice: Choice) -> Tensor:
    c = choice
    return ops.pick_blocks(c.scores, c.low, c.high, c.sink, c.take, c.tau, c.forced)


def assert_defined(choice: Choice) -> None:
    got = run(choice)
    rows, heads, count, blocks = choice.scores.shape
    most = blocks if choice.take is None else min(blocks, choice.sink + choice.forced + choice.take)
    assert got.dtype == torch.int32
    assert got.shape == (rows, heads, count, most)
    for row in range(rows):
        for head in range(heads):
            for n in range(count):
                expected = choice.picked(row, head, n)
                assert got[row, head, n].tolist() == expected + [-1] * (most - len(expected))


@MANY
@given(choices(by_share=False))
def test_the_best(choice: Choice) -> None:
    assert_defined(choice)


@MANY
@given(choices(by_share=True))
def test_a_share(choice: Choice) -> None:
    assert_defined(choice)


@settings(max_examples=20)
@given(choices(by_share=True))
def test_some_blocks_of_queries_at_a_time(choice: Choice) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pick, "LOGITS_PER_BLOCK", 1)
        assert_defined(choice)


@pytest.mark.parametrize("take", [None, 40])
def test_equal_scores_go_to_the_first_however_many_they_are(take: int | None) -> None:
    scores = torch.full((1, 1, 1, 5000), 0.25)
    tau = torch.tensor([42.5 / 5000]) if take is None else None  # 3 are forced; 40 more hold the share
    low, high = torch.tensor([[4998]]), torch.tensor([[4999]])
    ids = ops.pick_blocks(scores, low, high, 1, take, tau, 2)[0, 0, 0]
    assert ids[:43].tolist() == [*range(41), 4998, 4999]
    assert (ids[43:] == -1).all()


def test_a_share_of_one_picks_all_whatever_rounding_says() -> None:
    scores = torch.zeros(1, 2, 1, 300)
    scores[..., 0] = 1.0  # forced blocks hold everything
    ids = ops.pick_blocks(scores, torch.tensor([[298]]), torch.tensor([[298]]), 1, None, torch.tensor([1.0, 0.9]), 1)
    assert ids[0, 0, 0].tolist() == [*range(299), -1]
    assert ids[0, 1, 0].tolist() == [0, 298] + [-1] * 298


def test_scores_after_the_last_query_count_for_nothing() -> None:
    scores = torch.tensor([0.1, 0.5, 0.2, 0.2, torch.nan, 9.0]).expand(1, 1, 1, -1)
    ids = ops.pick_blocks(scores, torch.tensor([[3]]), torch.tensor([[3]]), 0, None, torch.tensor([0.65]), 1)
    assert ids.tolist() == [[[[1, 3, -1, -1, -1, -1]]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    scores = torch.tensor([1.0, 3.0, 2.0, 4.0, 0.0], dtype=dtype).expand(1, 1, 1, -1)
    ids = ops.pick_blocks(scores, torch.tensor([[4]]), torch.tensor([[4]]), 0, 2, None, 1)
    assert ids.tolist() == [[[[1, 3, 4]]]]
