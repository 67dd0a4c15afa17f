"""Calls cut at multiples of a size, against the same by hand."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_longctx.cache.pieces import Blocks, pieces
from hf_longctx.cache.step import Step


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """A call of some tokens after some others; rows alike, or of their own lengths and paddings."""
    tokens, columns = draw(st.integers(1, 20)), draw(st.integers(0, 20))
    if draw(st.booleans()):
        return Step.of(columns, tokens, torch.device("cpu"), None, None)
    rows = draw(st.integers(1, 3))
    lengths = torch.tensor(draw(st.lists(st.integers(0, columns), min_size=rows, max_size=rows)))
    counts = torch.tensor(draw(st.lists(st.integers(0, tokens), min_size=rows, max_size=rows)))
    real = torch.arange(tokens) < counts[:, None]
    return Step(columns, tokens, torch.device("cpu"), lengths, real, True)


def positions(step: Step) -> list[list[int]]:
    """Positions of each row's real tokens."""
    return [[p for p in row if p >= 0] for row in step.pos.tolist()]


@given(steps(), st.integers(1, 7))
def test_blocks_of_queries(step: Step, size: int) -> None:
    blocks = Blocks.of(step, size)
    q = torch.arange(step.tokens, dtype=torch.float32).view(1, 1, -1, 1).expand(len(step.lengths), -1, -1, -1)
    taken = blocks.take(q, 0, blocks.number)
    for row, own in enumerate(positions(step)):
        grid = blocks.pos[row].view(-1, size).tolist()
        found = [[p for p in block if p >= 0] for block in grid]
        first = (own[0] if own else 0) // size
        expected = [[p for p in own if p // size == first + n] for n in range(len(grid))]
        assert found == expected
        assert all(block[: len(f)] == f for block, f in zip(grid, found, strict=True))
        for place, pos in enumerate(blocks.pos[row].tolist()):
            if pos >= 0:
                assert taken[row, 0, place, 0] == pos - own[0]
    restored = blocks.restore(taken)
    for row, own in enumerate(positions(step)):
        assert restored[row, 0, : len(own), 0].tolist() == list(range(len(own)))


@given(steps(), st.integers(1, 7))
def test_calls_that_follow_each_other(step: Step, size: int) -> None:
    rows = len(step.lengths)
    seen: list[list[int]] = [[] for _ in range(rows)]
    ends = step.lengths.tolist()
    for tokens, piece in pieces(step, size):
        assert piece.tokens <= size
        index = torch.arange(step.tokens)[tokens].expand(rows, -1) if isinstance(tokens, slice) else tokens
        for row, own in enumerate(positions(piece)):
            assert len({p // size for p in own}) <= 1
            assert piece.lengths[row if step.ragged else 0] == ends[row] <= piece.columns
            assert own == [ends[row] + i for i in range(len(own))]
            first = int(step.lengths[row])
            assert index[row, : len(own)].tolist() == [p - first for p in own]
            ends[row] += len(own)
            seen[row] += own
    assert seen == positions(step)
