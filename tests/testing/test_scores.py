"""Scores computed by hand: two or three blocks, two channels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hf_longctx.plan import Selector
from hf_longctx.select.budgets import Mass, TopK
from hf_longctx.select.scorers import Antidiagonal, RepresentativeDot, RepresentativeShare, UpperBound
from hf_longctx.select.summaries import Means, MinMax, Representatives
from hf_longctx.testing.scores import score
from hf_longctx.testing.visible import Span

from .scenes import scene

INF = float("inf")
NONE = torch.zeros(1, 6, dtype=torch.float64)


def test_the_upper_bound_takes_each_channel_by_itself() -> None:
    keys = [[1, -2], [3, 0], [-1, 5], [0, 0], [9, 9]]
    queries = [[0, 0]] * 4 + [[2, -1]]
    selector = Selector(UpperBound(MinMax(2, 2)), TopK(2))
    at = scene([queries], [keys], [Span(0, 4, True)])
    # bounds (1 to 3, -2 to 0) and (-1 to 0, 0 to 5): 2 * 3 + -1 * -2, and 2 * 0 + -1 * 0; the own block is not scored
    assert score(selector, at, 4, 4, NONE).tolist() == [[8, 0, -INF]]


def test_the_upper_bound_is_the_best_of_its_sub_blocks() -> None:
    keys = [[1, -2], [3, 0], [-1, 5], [0, 0], [9, 9], [9, 9]]
    queries = [[0, 0]] * 4 + [[2, -1], [0, 3]]
    at = scene([queries], [keys], [Span(0, 5, True)])
    fine, coarse = (Selector(UpperBound(MinMax(4, sub)), TopK(4)) for sub in (1, 4))
    assert score(fine, at, 4, 4, NONE).tolist() == [[6, -INF]]  # the products are 4, 6, -7, 0
    assert score(coarse, at, 4, 4, NONE).tolist() == [[8, -INF]]
    assert score(coarse, at, 5, 5, NONE).tolist() == [[15, -INF]]


def test_representatives_are_the_keys_with_most_mass_and_of_equal_ones_the_first() -> None:
    keys = [[1, 0], [5, 0], [2, 0], [3, 0], [0, 0], [0, 0]]
    queries = [[0, 0]] * 4 + [[1, 0], [3, 0]]
    mass = torch.tensor([[0.5, 0.2, 0.9, 0.5, 0, 0]])
    at = scene([queries], [keys], [Span(0, 5, False)])
    for count, mean in ((1, 2), (2, 1.5), (3, 2), (4, 2.75)):  # by mass: 2, then 1 before 3, then 5
        selector = Selector(RepresentativeDot(Representatives(4, count), 2), TopK(4))
        assert score(selector, at, 4, 5, mass).tolist() == [[2 * mean, -INF]]  # the mean query is (2, 0)


def test_of_the_means_of_runs_the_largest_product_counts() -> None:
    keys = [[1, 0], [5, 0], [2, 0], [3, 0], [0, 0], [0, 0]]
    queries = [[0, 0]] * 4 + [[1, 0], [3, 0]]
    at = scene([queries], [keys], [Span(0, 5, False)])
    for sub, mean in ((1, 5), (2, 3), (4, 2.75)):
        selector = Selector(RepresentativeDot(Means(4, sub), 2), TopK(4))
        assert score(selector, at, 4, 5, NONE).tolist() == [[2 * mean, -INF]]


def test_shares_of_means_add_up_over_a_block_and_to_one_over_all_that_are_far() -> None:
    keys = [[1, 0], [5, 0], [2, 0], [3, 0], [9, 0], [9, 0]]
    queries = [[0, 0]] * 4 + [[1, 0], [3, 0]]
    at = scene([queries], [keys], [Span(0, 5, False)])
    selector = Selector(RepresentativeShare(Means(2, 1), 2), TopK(2))
    near, wide = score(selector, at, 4, 5, NONE)[0].tolist(), [math.exp(2 * x) for x in (1, 5, 2, 3)]
    assert near[:2] == pytest.approx([sum(wide[:2]) / sum(wide), sum(wide[2:]) / sum(wide)])
    assert near[2] == -INF


def test_clamped_representatives_are_not_rotated_and_their_query_stands_at_the_edge() -> None:
    """The rotation is one that can be read off: by the position."""
    keys = [[1, 0], [5, 0], [2, 0], [3, 0], [0, 0], [0, 0]]
    queries = [[0, 0]] * 4 + [[1, 0], [3, 0]]
    selector = Selector(RepresentativeDot(Representatives(4, 4), 2), TopK(4))
    far = replace(scene([queries], [keys], [Span(0, 5, False)], far=3), turn=lambda x, at: x * at[..., None])
    assert score(selector, far, 4, 5, NONE).tolist() == [[3 * 2 * 2.75, -INF]]
    near = replace(far, far=None)
    mean_key, mean_query = (0 * 1 + 1 * 5 + 2 * 2 + 3 * 3) / 4, (4 * 1 + 5 * 3) / 2
    assert score(selector, near, 4, 5, NONE).tolist() == [[mean_key * mean_query, -INF]]


def test_antidiagonals_by_hand() -> None:
    keys = [[1, 0], [2, 0], [0, 1], [1, 1]]
    queries = [[0, 0], [0, 0], [1, 0], [0, 2]]
    selector = Selector(Antidiagonal(2, 2), Mass(0.5))
    at = scene([queries], [keys], [Span(0, 3, False)])
    # q3.k0 + q2.k1 = 0 + 2, and q3.k2 + q2.k3 = 2 + 1; halved, for the stride is 2
    one, two = math.exp(1), math.exp(1.5)
    got = score(selector, at, 2, 3, NONE)
    torch.testing.assert_close(got, torch.tensor([[one, two]], dtype=torch.float64) / (one + two))


@pytest.mark.parametrize(("first", "last", "products"), [(2, 2, (2, 0)), (3, 3, (0, 2))])
def test_antidiagonals_of_half_a_tile(first: int, last: int, products: tuple[int, int]) -> None:
    """Queries before the call, and keys after it, are zero."""
    keys = [[1, 0], [2, 0], [0, 1], [1, 1]]
    queries = [[0, 0], [0, 0], [1, 0], [0, 2]]
    at = scene([queries], [keys], [Span(first, last, False)])
    expected = torch.tensor([[math.exp(x / 2) for x in products]], dtype=torch.float64)
    got = score(Selector(Antidiagonal(2, 2), Mass(0.5)), at, first, last, NONE)
    torch.testing.assert_close(got, expected / expected.sum())


def test_antidiagonals_of_ones_share_by_keys() -> None:
    """Zero products: every tile of queries shares itself out evenly among the tiles up to its own."""
    at = scene(torch.zeros(1, 8, 2), torch.ones(1, 8, 2), [Span(0, 7, False)])
    got = score(Selector(Antidiagonal(4, 2), Mass(0.5)), at, 4, 7, NONE)
    torch.testing.assert_close(got, torch.tensor([[2 / 3 + 2 / 4, 1 / 3 + 2 / 4]], dtype=torch.float64))


def test_every_query_head_scores_the_keys_of_its_own_kv_head() -> None:
    keys = torch.stack((torch.ones(6, 2), 10 * torch.ones(6, 2)))
    queries = torch.stack([h * torch.ones(6, 2) for h in (1, 2, 3, 4)])
    at = scene(queries, keys, [Span(0, 5, True)])
    mass = torch.zeros(2, 6)
    for scorer in (UpperBound(MinMax(2, 1)), RepresentativeDot(Representatives(2, 1), 1)):
        got = score(Selector(scorer, TopK(2)), at, 5, 5, mass)
        assert got[:, :2].tolist() == [[2, 2], [4, 4], [60, 60], [80, 80]]
