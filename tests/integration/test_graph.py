"""Recorded decode steps give what the same calls give as they are: every family, every method that can be recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_longctx as lc
from hf_longctx import recording

from ..methods.cases import DECODERS, LIMITS, LOSSY, SELECTING, Row, named, pairs
from .again import recorders
from .cases import BY_NAME
from .test_generate import batch, generate, single
from .tiny import Case

LLAMA = BY_NAME["llama"]
QUEST, _, LSERVE, INF_LLM = SELECTING
STORED = (
    Row("quest_all", lambda case: lc.Quest(8, page=4, dense_layers=0, share="all")),
    Row("quest_dense_below", lambda case: lc.Quest(8, page=4, dense_layers=0, dense_below=45)),
)
PAIRS = [*pairs((LIMITS[0], *LOSSY, LSERVE)), *pairs((QUEST, *STORED), tuple(BY_NAME[n] for n in ("llama", "gemma3")))]
CHANGING = [case for case in DECODERS if case.rope in ("dynamic", "longrope")]


def both(row: Row, case: Case, inputs: Any, **options: Any) -> tuple[Any, Any]:
    """What `generate` gives with recorded steps, and without; on two models, as some remember the longest text."""
    recorded, plain = (lc.patch(case.make(), row.method(case), cuda_graph=on) for on in (True, False))
    return tuple(generate(model, inputs, output_logits=True, **options) for model in (recorded, plain))


def assert_same(recorded: Any, plain: Any) -> None:
    assert torch.equal(recorded.sequences, plain.sequences)
    for a, b in zip(recorded.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.fixture(autouse=True)
def _little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "ROOM", 8)  # so that a few steps run into the end of it


@pytest.mark.parametrize(("row", "case"), PAIRS, ids=named)
def test_padded_batch(row: Row, case: Case) -> None:
    with recorders() as again:
        assert_same(*both(row, case, batch(case)))
    assert again.replayed >= 6 if case not in CHANGING else again.replayed == 0


@pytest.mark.parametrize("row", [LIMITS[0], *LOSSY, QUEST, LSERVE, *STORED], ids=named)
@pytest.mark.parametrize(
    "options", [{"do_sample": True, "temperature": 0.7}, {"num_beams": 3}, {"max_new_tokens": 30}], ids=str
)
def test_one_row(row: Row, options: dict[str, Any]) -> None:
    with recorders() as again:
        assert_same(*both(row, LLAMA, single(LLAMA), **options))
    assert again.replayed > 5
    assert again.recorded < again.replayed
