"""The claims of `hf-longctx demo`, and the needle grid, on the real model."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from hf_longctx import demo
from hf_longctx.evals import needle, passkey, text

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def outcomes(smollm2: tuple[Any, Any]) -> dict[str, demo.Outcome]:
    model, tokenizer = smollm2
    trial = passkey.build(tokenizer, text.shipped(), 1024, 0.3, seed=5)
    assert trial.distance > 508
    knobs: dict[str, dict[str, Any]] = {"streaming_llm": {"sinks": 4, "window": 252}}
    names, left_out = demo.choose(model, None, knobs)
    assert left_out == []
    quiet = Console(quiet=True)
    return {name: demo.ask(model, tokenizer, trial, name, knobs.get(name, {}), 8, quiet) for name in names}


def test_dense_and_retrieval_heads_find_what_a_window_cannot_see(outcomes: dict[str, demo.Outcome]) -> None:
    assert {name: outcome.right for name, outcome in outcomes.items()} == {
        "dense": True,
        "streaming_llm": False,
        "duo_attention": True,
        "quest": True,
    }


def test_the_bytes_are_those_of_what_is_kept(outcomes: dict[str, demo.Outcome]) -> None:
    per_token = 2 * 30 * 3 * 64 * 4
    held = {name: outcome.answer.kv_bytes for name, outcome in outcomes.items()}
    assert outcomes["dense"].answer.dense_kv_bytes == per_token * 1031  # the last token is never fed back
    assert held["streaming_llm"] == per_token * 256
    assert held["streaming_llm"] < held["duo_attention"] < held["dense"]


def test_a_needle_grid_shows_where_a_method_is_blind(smollm2: tuple[Any, Any]) -> None:
    methods = "duo_attention,streaming_llm(sinks=4,window=252)"
    rows = needle.run(*smollm2, methods, [1024], [0.25, 0.6], new_tokens=8)
    assert {(row.method.split("(")[0], row.depth): row.score for row in rows} == {
        ("dense", 0.25): 1.0,
        ("dense", 0.6): 1.0,
        ("duo_attention", 0.25): 1.0,
        ("duo_attention", 0.6): 1.0,
        ("streaming_llm", 0.25): 0.0,
        ("streaming_llm", 0.6): 0.0,
    }
