from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_longctx.evals import passkey, text


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(300, 900), depth=st.floats(0, 1), seed=st.integers(0, 10_000))
def test_a_trial_is_as_long_as_asked_and_knows_its_needle(
    tiny: tuple[Any, Any], length: int, depth: float, seed: int
) -> None:
    _, tokenizer = tiny
    trial = passkey.build(tokenizer, text.shipped(), length, depth, seed)
    assert len(trial.ids) == length
    first, end = trial.needle
    assert tokenizer.decode(trial.ids[first:end]) == passkey.NEEDLE.format(key=trial.key)
    assert trial.distance == length - end
    prompt = tokenizer.decode(trial.ids)
    assert prompt.count(trial.key) == 2
    assert prompt.startswith(passkey.INSTRUCTION)
    assert prompt.endswith(passkey.QUESTION)


def test_depth_moves_the_needle_and_the_seed_draws_key_and_text(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    trials = [passkey.build(tokenizer, text.shipped(), 800, depth, 3) for depth in (0, 0.25, 0.5, 0.75, 1)]
    places = [trial.needle[0] for trial in trials]
    assert places == sorted(places)
    assert len(set(places)) == 5
    assert len({trial.key for trial in trials}) == 1
    other = passkey.build(tokenizer, text.shipped(), 800, 0.5, 4)
    assert other.key != trials[2].key
    assert other.ids.tolist() != trials[2].ids.tolist()
    assert passkey.build(tokenizer, text.shipped(), 800, 0.5, 4).ids.tolist() == other.ids.tolist()


def test_the_needle_follows_a_full_stop(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    trial = passkey.build(tokenizer, text.shipped(), 900, 0.4, 7)
    assert tokenizer.decode(trial.ids[: trial.needle[0]]).endswith(".")


def test_a_short_text_is_repeated(tiny: tuple[Any, Any]) -> None:
    _, tokenizer = tiny
    trial = passkey.build(tokenizer, "The sky was blue. ", 400, 0.5, 0)
    assert tokenizer.decode(trial.ids).count("The sky was blue.") > 5


@pytest.mark.parametrize(
    ("length", "depth", "said"), [(40, 0.5, "length of at least"), (400, 1.5, "depth from 0 to 1")]
)
def test_bad_trials_are_refused(tiny: tuple[Any, Any], length: int, depth: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        passkey.build(tiny[1], text.shipped(), length, depth)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 12345.", True),
        ("\n12345 and 99999", True),
        (": the number 12345", True),
        (" 123456", False),
        (" 99999, not 12345", False),
        (" a key", False),
        ("", False),
    ],
)
def test_judge_takes_the_first_number(answer: str, right: bool) -> None:
    assert passkey.judge(answer, "12345") is right
