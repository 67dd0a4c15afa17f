"""A real model has heads that copy; without them it cannot, and without as many others it can."""

from __future__ import annotations

from typing import Any

import pytest

import hf_longctx as lc
from hf_longctx.evals import passkey, runner, text
from hf_longctx.evals.grammar import Choice
from hf_longctx.heads.ablate import ablated
from hf_longctx.heads.compare import layer_matched
from hf_longctx.heads.detect import Settings, prompts, run, score
from hf_longctx.heads.needles import load_needles
from hf_longctx.heads.scores import HeadScores

pytestmark = pytest.mark.network
Q_HEADS = [9] * 30


@pytest.fixture(scope="module")
def scores(smollm2: tuple[Any, Any]) -> HeadScores:
    settings = Settings([360], [0.2, 0.7], 3, forced=True, chat=True, batch=3)
    asked = prompts(smollm2[1], text.shipped(), load_needles(), settings)
    rows = run(*smollm2, asked, settings)
    assert sum(row.kept for row in rows) >= 5
    return score(rows, Q_HEADS, "paper", "SmolLM2")


def test_few_heads_copy(scores: HeadScores) -> None:
    means = scores.means.values()
    assert {(18, 6), (17, 3)} <= set(scores.top(5))
    assert sum(mean >= 0.5 for mean in means) >= 3
    assert sum(mean >= 0.1 for mean in means) <= 40


def test_without_them_no_pass_key_is_found(smollm2: tuple[Any, Any], scores: HeadScores) -> None:
    exam = passkey.exam(smollm2[1], "needle", [360], [0.3, 0.6], 2, None, 8, 0)
    trials, found = list(exam.trials), {}
    for name, heads in (("top", scores.top(10)), ("random", layer_matched(scores.top(10), Q_HEADS, 0))):
        with lc.patched(smollm2[0], "dense"), ablated(smollm2[0], heads):
            [(_, said)] = runner.answers(*smollm2, Choice("dense", "dense"), trials, 4, 512)
        found[name] = sum(exam.score(s.text, t.expected) for s, t in zip(said, trials, strict=True))
    assert found["top"] == 0
    assert found["random"] >= 3
