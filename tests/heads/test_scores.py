"""Score files: read and written bit for bit, and every way in which one can be wrong."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hf_longctx.heads import available_patterns, load_pattern, save_pattern
from hf_longctx.heads.convert import to_pattern, to_scores
from hf_longctx.heads.scores import HeadScores, load_scores, save_scores

TRIALS = {(0, 0): (0.0, 0.1, 1 / 3), (0, 1): (0.25, 1.0, 0.7), (1, 0): (0.0, 0.0, 0.0), (1, 1): (1.79, 0.1, 0.2)}


def test_a_published_file_round_trips_byte_for_byte(tmp_path: Path) -> None:
    text = '{"16-19": [0.9411764705882353, 1.0000000000000002], "0-0": [0.0, 5e-324], "11-15": [1, 0.1]}'
    (tmp_path / "a.json").write_text(text)
    scores = load_scores(tmp_path / "a.json")
    assert scores.top(1) == [(16, 19)]
    save_scores(scores, tmp_path / "b.json")
    assert (tmp_path / "b.json").read_text() == text.replace("[1, 0.1]", "[1.0, 0.1]")
    assert load_scores(tmp_path / "b.json").trials == scores.trials


def test_means_intervals_and_activity_are_those_of_the_trials() -> None:
    scores = HeadScores(TRIALS)
    share = scores.shares()[0, 1]
    values = [0.25, 1.0, 0.7]
    mean = sum(values) / 3
    error = 1.96 * math.sqrt(sum((x - mean) ** 2 for x in values) / 2) / math.sqrt(3)
    assert share.mean == pytest.approx(mean)
    assert (share.low, share.high) == (pytest.approx(mean - error), pytest.approx(mean + error))
    assert scores.shares()[0, 0].active == pytest.approx(2 / 3)
    assert scores.shares()[1, 0].active == 0
    assert scores.ranked() == [(1, 1), (0, 1), (0, 0), (1, 0)]
    np.testing.assert_allclose(scores.grid(), [[scores.means[0, 0], mean], [0, scores.means[1, 1]]])
    one = HeadScores({(0, 0): (0.1,)})
    assert one.means == {(0, 0): 0.1}
    assert (one.shares()[0, 0].low, one.shares()[0, 0].high) == (None, None)


def test_halves_are_disjoint_and_together_the_whole() -> None:
    for seed in range(5):
        first, second = HeadScores(TRIALS).halves(seed)
        assert (first.count, second.count) == (1, 2)
        for head, scores in TRIALS.items():
            assert sorted(first.trials[head] + second.trials[head]) == sorted(scores)
        which = TRIALS[0, 1].index(first.trials[0, 1][0])
        assert first.trials[1, 1] == (TRIALS[1, 1][which],)
    assert len({HeadScores(TRIALS).halves(seed)[0].trials[0, 1] for seed in range(20)}) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", r'expected {"layer-head": \[scores\]}; got list'),
        ("{", "expected JSON"),
        ('{"16": [1.0]}', "expected heads named layer-head, such as 16-19; got '16'"),
        ('{"1-2": 0.5}', "head 1-2: expected a list of numbers"),
        ('{"1-2": ["a"]}', "'a' in place of a number"),
        ('{"1-2": [NaN]}', "head 1-2: expected scores of 0 or more; got nan"),
        ('{"1-2": [-0.5]}', "got -0.5"),
        ('{"0-0": [1.0], "0-1": [1.0, 2.0]}', "head 0-1: expected 1 trials, as in the first head; got 2"),
        ('{"0-0": []}', "expected scores of at least one trial; got none"),
        ("{}", "expected scores of at least one trial; got none"),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_the_head(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=said) as caught:
        load_scores(tmp_path / "bad.json")
    assert "bad.json" in str(caught.value)


def test_a_file_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="heads detect"):
        load_scores(tmp_path / "none.json")


def test_heads_that_the_model_does_not_have_are_refused() -> None:
    scores = HeadScores(TRIALS)
    scores.check([2, 2])
    with pytest.raises(ValueError, match=r"expected a head of the model \(1 layers of 2 query heads\); got 1-0"):
        scores.check([2])
    with pytest.raises(ValueError, match="got 0-1"):
        scores.check([1, 2])
    with pytest.raises(ValueError, match="expected scores of all 5 heads; got none of 1-2"):
        scores.check([2, 3])
    with pytest.raises(ValueError, match="expected 1 to 4 heads; got 5"):
        scores.top(5)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scores.json"
    save_scores(HeadScores(TRIALS), path)
    old = path.read_bytes()

    def full(value: Any, stream: Any) -> None:
        stream.write("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError, match="No space left"):
        save_scores(HeadScores({(0, 0): (1.0,)}), path)
    assert path.read_bytes() == old
    assert [each.name for each in tmp_path.iterdir()] == ["scores.json"]


# gates ---------------------------------------------------------------------------------------------------------------


def test_a_kv_head_has_the_score_of_its_best_query_head_at_most_one() -> None:
    scores = HeadScores({(0, 0): (0.1,), (0, 1): (0.4,), (0, 2): (0.2,), (0, 3): (1.2,)})
    assert to_pattern(scores, 2).gates == ((0.4, 1.0),)
    assert to_pattern(scores, 2, "mean").gates == ((0.25, 0.7),)
    assert to_pattern(scores, 4).gates == ((0.1, 0.4, 0.2, 1.0),)


@pytest.mark.parametrize("name", available_patterns())
@pytest.mark.parametrize("per_kv", [1, 4])
def test_published_gates_go_to_scores_and_back_bit_for_bit(name: str, per_kv: int, tmp_path: Path) -> None:
    pattern = load_pattern(name)
    kv_heads = len(pattern.gates[0])
    save_scores(to_scores(pattern, kv_heads * per_kv), tmp_path / "scores.json")
    back = to_pattern(load_scores(tmp_path / "scores.json"), kv_heads)
    assert back.gates == pattern.gates
    save_pattern(back, tmp_path / "again")
    assert load_pattern(tmp_path / "again").gates == pattern.gates


def test_what_cannot_be_converted_is_refused() -> None:
    scores = HeadScores(TRIALS)
    with pytest.raises(ValueError, match="layer 0: expected query heads in 3 equal groups; got 2"):
        to_pattern(scores, 3)
    with pytest.raises(ValueError, match="got 2"):
        to_pattern(scores, 0)
    with pytest.raises(ValueError, match="reduce: expected one of max, mean; got 'sum'"):
        to_pattern(scores, 1, "sum")
    with pytest.raises(ValueError, match="expected scores of every head of every layer; got 2-0"):
        to_pattern(HeadScores({(0, 0): (1.0,), (2, 0): (1.0,)}), 1)
    with pytest.raises(ValueError, match="expected a multiple of 32 query heads; got 8"):
        to_scores(load_pattern("Llama-2-7B-32K-Instruct"), 8)
