"""Agreement of captions: greedy matching is the best there is, and every figure is what it says."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longctx.evals.alignment import align, words
from hf_longctx.streaming.subtitles import Cue

REFERENCE = [Cue(0, 1, "Red 0"), Cue(1, 2, "blue, 1"), Cue(4, 5, "Goal!")]


def test_the_same_captions_agree() -> None:
    found = align(REFERENCE, REFERENCE)
    assert (found.precision, found.recall, found.f1, found.lag_s) == (1, 1, 1, 0)
    assert found.per_second == (1, 1, None, None, 1)


def test_every_figure() -> None:
    said = [Cue(0.5, 1.5, "RED red 0"), Cue(9, 10, "goal")]
    found = align(REFERENCE, said)
    # red at 0.25 and 0 at 0.75 are matched by 0.667 and 1.333; "red" once more and the late goal are not
    assert (found.precision, found.recall) == (2 / 4, 2 / 5)
    assert found.f1 == pytest.approx(2 * 0.5 * 0.4 / 0.9)
    assert found.lag_s == pytest.approx(((0.5 + 1 / 6) - 0.25 + (0.5 + 5 / 6) - 0.75) / 2)
    assert found.per_second == (1, 0, None, None, 0)


def test_words_are_spread_over_their_caption() -> None:
    assert words([Cue(1, 2, "It's Ann-Lee"), Cue(0, 0, "")]) == [
        (1.125, "it"),
        (1.375, "s"),
        (1.625, "ann"),
        (1.875, "lee"),
    ]


def test_silence_agrees_with_nothing() -> None:
    found = align(REFERENCE, [])
    assert (found.precision, found.recall, found.f1, found.lag_s) == (0, 0, 0, None)


def test_tolerance() -> None:
    late = [Cue(cue.start + 2, cue.end + 2, cue.text) for cue in REFERENCE]
    assert align(REFERENCE, late, 1.99).f1 == 0
    assert align(REFERENCE, late, 2.0).f1 == 1
    assert align(REFERENCE, late, 2.0).lag_s == pytest.approx(2)


@settings(max_examples=80)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from("ab")), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from("ab")), max_size=5),
    st.integers(0, 3),
)
def test_no_other_matching_has_more_pairs(wanted: list, said: list, tolerance: int) -> None:
    reference, captions = ([Cue(t, t, w) for t, w in each] for each in (wanted, said))
    most = 0
    for order in itertools.permutations(range(len(said)), min(len(said), len(wanted))):
        for chosen in itertools.combinations(range(len(wanted)), len(order)):
            fits = [
                wanted[a][1] == said[b][1] and abs(wanted[a][0] - said[b][0]) <= tolerance
                for a, b in zip(chosen, order, strict=False)
            ]
            most = max(most, sum(fits))
    assert align(reference, captions, tolerance).recall == pytest.approx(most / len(wanted))


def test_a_judge_sees_both_sides_of_each_stretch() -> None:
    seen = []

    def judge(reference: str, said: str) -> float:
        seen.append((reference, said))
        return len(said)

    found = align(REFERENCE, [Cue(0.2, 1, "x"), Cue(2.1, 3, "y"), Cue(4, 5, "zzz")], judge=judge, segment_s=2)
    assert seen == [("Red 0 blue, 1", "x"), ("Goal!", "zzz")]
    assert found.judged == 2
    assert align(REFERENCE, REFERENCE).judged is None


@pytest.mark.parametrize("knobs", [{"tolerance_s": -1}, {"tolerance_s": float("nan")}, {"segment_s": 0}])
def test_times_out_of_range(knobs: dict) -> None:
    with pytest.raises(ValueError, match="expected"):
        align(REFERENCE, REFERENCE, **knobs)
    with pytest.raises(ValueError, match="words in the reference"):
        align([], REFERENCE)
