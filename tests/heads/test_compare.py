"""Ranks, overlaps, and random heads of the same layers."""

from __future__ import annotations

from collections import Counter

import pytest

from hf_longctx.heads.compare import layer_matched, overlap, spearman, stability
from hf_longctx.heads.scores import HeadScores


def table(*values: float) -> dict[tuple[int, int], float]:
    return {(0, i): value for i, value in enumerate(values)}


def test_spearman_is_the_correlation_of_ranks_with_ties_in_the_middle() -> None:
    assert spearman(table(1, 2, 3, 4), table(10, 20, 30, 400)) == pytest.approx(1)
    assert spearman(table(1, 2, 3, 4), table(9, 8, 7, 0)) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: 4.5 / sqrt(4.5 * 5)
    assert spearman(table(1, 2, 2, 3), table(1, 2, 3, 4)) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert spearman(table(1, 2), table(1, 1)) != spearman(table(1, 2), table(1, 1))  # nothing to rank


def test_stability_is_1_where_every_trial_says_the_same_and_none_where_nothing_can_be_ranked() -> None:
    assert stability(HeadScores({(0, h): (float(h),) * 6 for h in range(4)})) == pytest.approx(1)
    assert stability(HeadScores({(0, h): (float(h), 3.0 - h) for h in range(4)})) == pytest.approx(-1)
    assert stability(HeadScores({(0, h): (float(h),) for h in range(4)})) is None
    assert stability(HeadScores({(0, h): (1.0, float(h)) for h in range(4)})) is None


def test_overlap_counts_common_heads_at_the_top() -> None:
    assert overlap(table(4, 3, 2, 1), table(4, 1, 3, 2), 2) == 0.5
    assert overlap(table(4, 3, 2, 1), table(4, 1, 3, 2), 4) == 1


def test_files_of_other_heads_are_not_compared() -> None:
    with pytest.raises(ValueError, match="got 2 and 3, of which 2 are in both"):
        spearman(table(1, 2), table(1, 2, 3))
    with pytest.raises(ValueError, match="expected 1 to 2 heads; got 3"):
        overlap(table(1, 2), table(1, 2), 3)


def test_random_heads_are_others_of_the_same_layers_and_hang_on_the_seed() -> None:
    chosen = [(0, 1), (2, 0), (2, 5), (2, 7)]
    drawn = [layer_matched(chosen, [8, 8, 8], seed) for seed in range(20)]
    for heads in drawn:
        assert not set(heads) & set(chosen)
        assert len(set(heads)) == 4
        assert Counter(layer for layer, _ in heads) == {0: 1, 2: 3}
    assert drawn[3] == layer_matched(chosen, [8, 8, 8], 3)
    assert len({tuple(heads) for heads in drawn}) > 10


def test_a_layer_with_too_few_others_borrows_from_the_nearest() -> None:
    heads = layer_matched([(1, 0), (1, 1), (1, 2)], [4, 4, 4, 4], 0)
    assert (1, 3) in heads
    assert Counter(layer for layer, _ in heads) == {0: 2, 1: 1}
    with pytest.raises(ValueError, match="expected 3 that are not chosen; got too few"):
        layer_matched([(0, 0), (0, 1), (0, 2)], [4], 0)
