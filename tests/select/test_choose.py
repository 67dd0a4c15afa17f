"""What a choice forces, now and for the steps that go by it."""

from __future__ import annotations

import pytest
import torch

import hf_longctx as lc
from hf_longctx.select.budgets import TopK
from hf_longctx.select.choose import forced, forced_ahead, most_forced
from hf_longctx.select.scorers import UpperBound
from hf_longctx.select.summaries import MinMax


def blocks(near: tuple[torch.Tensor, torch.Tensor]) -> set[int]:
    low, high = (int(x) for x in near)
    return set(range(low, high + 1))


@pytest.mark.parametrize(
    ("block", "local", "every", "below"), [(4, 1, 4, 0), (4, 6, 9, 0), (16, 5, 2, 0), (4, 3, 5, 30)]
)
def test_a_choice_has_what_later_steps_force(block: int, local: int, every: int, below: int) -> None:
    scorer = UpperBound(MinMax(block, block))
    selector = lc.Selector(scorer, TopK(block), local=local, refresh_every=every, dense_below=below)
    for place in range(50):
        ahead = blocks(forced_ahead(selector, torch.tensor([place])))
        assert len(ahead) <= most_forced(selector, 1)
        for later in range(place, place + every):
            now = blocks(forced(selector, torch.tensor([[later]]), 1))
            dense_once = place < below <= later  # a choice made where all is read stays one of all
            assert now <= ahead
            assert dense_once or place < below or all(j >= min(now) or j * block <= place for j in ahead)
        assert max(ahead) == (place + every - 1) // block


@pytest.mark.parametrize("below", [0, 30])
@pytest.mark.parametrize("local", [1, 5, 16])
def test_one_query_forces_what_a_block_of_it_and_nobody_does(local: int, below: int) -> None:
    """One query a block has a way of its own, of fewer operations."""
    selector = lc.Selector(UpperBound(MinMax(4, 4)), TopK(4), local=local, dense_below=below)
    pos = torch.arange(-1, 60)[None]
    beside = torch.stack((pos, torch.full_like(pos, -1)), -1).view(1, -1)
    for one, two in zip(forced(selector, pos, 1), forced(selector, beside, 2), strict=True):
        assert torch.equal(one, two)
