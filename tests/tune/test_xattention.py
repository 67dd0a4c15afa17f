"""Curves and thresholds against their literal definitions, and the dynamic programme against all assignments."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longctx.tune.xattention import (
    GRID,
    Curve,
    Floats,
    at_coverage,
    covered,
    curves,
    density,
    fewest_blocks,
    joined,
)


def layer(seed: int, heads: int, blocks: int, ties: bool = False) -> tuple[Floats, Floats]:
    """Random true masses, whose rows add up to 1, and scores that resemble them: `[H, N, N]`, causal."""
    draw = np.random.default_rng(seed)
    mass = np.tril(draw.gamma(0.3, size=(heads, blocks, blocks)) + 1e-9)
    score = np.tril(mass * draw.lognormal(0, 1, mass.shape))
    if ties:
        score = np.tril(draw.integers(1, 4, mass.shape)).astype(np.float64)
    return mass / mass.sum(2, keepdims=True), score


def literal(mass: Floats, score: Floats, tau: float) -> tuple[int, float]:
    """Blocks that one head reads at a threshold, and true mass that it does not: the rule of `Selector` and `Mass`."""
    read, lost = 0, 0.0
    for n in range(len(mass)):
        forced = {0, n}
        ranked = sorted(set(range(n + 1)) - forced, key=lambda j: (-score[n, j], j))
        picked, held = set(forced), sum(score[n, j] for j in forced)
        for j in ranked:
            if tau >= 1 or held < tau * score[n, : n + 1].sum():
                picked.add(j)
            held += score[n, j]
        read += len(picked)
        lost += sum(mass[n, j] for j in range(n + 1) if j not in picked)
    return read, lost


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    blocks=st.integers(1, 9),
    tau=st.floats(0.01, 1),
    ties=st.booleans(),
)
def test_a_curve_says_what_a_threshold_reads_and_misses(seed: int, blocks: int, tau: float, ties: bool) -> None:
    mass, score = layer(seed, 3, blocks, ties)
    for head, curve in enumerate(curves(mass, score)):
        read, lost = literal(mass[head], score[head], tau)
        assert curve.read(tau) == read
        assert curve.lost(tau) == pytest.approx(lost, abs=1e-12)
        assert curve.blocks == blocks * (blocks + 1) // 2
        assert curve.total == pytest.approx(blocks)
        assert (curve.read(1.0), curve.lost(1.0)) == (curve.blocks, 0)


def test_joined_curves_add_up() -> None:
    parts = [curves(*layer(seed, 2, blocks)) for seed, blocks in ((1, 6), (2, 9), (3, 2))]
    for heads in zip(*parts, strict=True):
        whole = joined(heads)
        assert (whole.blocks, whole.total) == (21 + 45 + 3, pytest.approx(17))
        for tau in GRID:
            assert whole.read(tau) == sum(head.read(tau) for head in heads)
            assert whole.lost(tau) == pytest.approx(sum(head.lost(tau) for head in heads), abs=1e-12)
        assert np.array_equal(whole.read(GRID), [whole.read(tau) for tau in GRID])


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), blocks=st.integers(1, 7), coverage=st.floats(0.05, 1))
def test_at_coverage_is_the_share_of_blocks_that_score_as_those_that_matter(
    seed: int, blocks: int, coverage: float
) -> None:
    mass, score = layer(seed, 2, blocks)
    for head, tau in enumerate(at_coverage(mass, score, coverage)):
        pairs = sorted(((n, j) for n in range(blocks) for j in range(n + 1)), key=lambda pair: -mass[head][pair])
        matter, held = [], 0.0
        for pair in pairs:
            if held < coverage * mass[head].sum():
                matter.append(pair)
            held += mass[head][pair]
        lowest = min(score[head][pair] for pair in matter)
        expected = sum(score[head][p] for p in pairs if score[head][p] >= lowest) / score[head].sum()
        assert tau == pytest.approx(expected)
        assert 0 < tau <= 1


def options(head: Curve, share: float) -> dict[int, int]:
    """For each number of shares that a head may miss, the fewest blocks."""
    found: dict[int, int] = {}
    for tau in GRID:
        shares = math.ceil(float(head.lost(tau)) / share)
        found[shares] = min(found.get(shares, 10**9), int(head.read(tau)))
    return found


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6),
    heads=st.integers(1, 4),
    blocks=st.integers(3, 6),
    coverage=st.floats(0.5, 0.99),
    steps=st.integers(1, 12),
)
def test_no_assignment_reads_fewer_blocks(seed: int, heads: int, blocks: int, coverage: float, steps: int) -> None:
    """Every choice of thresholds is tried; those that miss too much do not count."""
    found = curves(*layer(seed, heads, blocks))
    share = (1 - coverage) * sum(head.total for head in found) / steps
    each = [options(head, share) for head in found]
    allowed = [way for way in product(*each) if sum(way) <= steps]
    fewest = min(sum(option[shares] for option, shares in zip(each, way, strict=True)) for way in allowed)
    taus = fewest_blocks(found, coverage, steps)
    assert set(taus) <= set(GRID)
    assert sum(head.read(tau) for head, tau in zip(found, taus, strict=True)) == fewest
    assert covered(found, taus) >= coverage - 1e-12


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), coverage=st.floats(0.3, 0.99), less=st.floats(0, 0.3), steps=st.integers(1, 200))
def test_more_freedom_never_reads_more(seed: int, coverage: float, less: float, steps: int) -> None:
    """Half as large shares, or a lower coverage, allow all that was allowed."""
    found = curves(*layer(seed, 5, 12))
    before = density(found, fewest_blocks(found, coverage, steps))
    assert density(found, fewest_blocks(found, coverage, 2 * steps)) <= before
    assert density(found, fewest_blocks(found, coverage - less, steps)) <= before


def test_nothing_may_be_missed() -> None:
    found = curves(*layer(0, 4, 9))
    taus = fewest_blocks(found, 1.0, 1000)
    assert covered(found, taus) == 1
    assert density(found, taus) == 1


def test_heads_that_lose_little_pay_for_those_that_lose_much() -> None:
    """A head whose attention is all in its own block is cut to the bone, and a flat one is left alone."""
    blocks = 24
    local = np.tril(np.full((blocks, blocks), 1e-4)) + np.eye(blocks)
    flat = np.tril(np.ones((blocks, blocks)))
    mass = np.stack((local, flat))
    mass /= mass.sum(2, keepdims=True)
    found = curves(mass, mass)
    narrow, wide = fewest_blocks(found, 0.99, 1000)
    assert found[0].read(narrow) == found[0].forced
    assert found[1].read(wide) == found[1].blocks
    one = min(tau for tau in GRID if covered(found, [tau, tau]) >= 0.99)
    assert density(found, [narrow, wide]) < 0.7 * density(found, [one, one])


def test_a_thousand_heads_take_seconds() -> None:
    found = curves(*layer(0, 1024, 32))
    taus = fewest_blocks(found, 0.9, 10_000)
    assert 0.9 <= covered(found, taus) < 0.91  # rounding up to shares costs a tenth at most
