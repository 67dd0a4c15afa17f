"""Recorded steps of a session give what they give as they are, and stay good when spans go."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_longctx import graph, recording, shortcut, shortcuts
from hf_longctx.stream import Session

from ..integration.again import Again, recorders
from ..kernels.built import need
from .vlms import ANY, BY_NAME, clip, families

SMALL: dict[str, Any] = {"window_s": 3, "text_sink": 90, "text_window": 90, "max_new_tokens": 5, "query": "Go on."}


def said(name: str, streams: int) -> list[tuple[int, str]]:
    clips = [clip(12, seed=seed) for seed in range(streams)]
    with Session(*BY_NAME[name].make(), **SMALL, streams=streams) as session:
        texts = []
        for event in session.run(clips[0] if streams == 1 else clips):
            texts.append((event.stream, event.text))
            if event.round == 6 and event.stream == streams - 1:
                texts.append((-1, session.ask("Who?", stream=event.stream).text))
    return texts


@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("name", families("qwen2_5_vl", "qwen3_vl", "idefics3"))
def test_recorded_rounds_are_the_same(name: str, streams: int) -> None:
    plain = said(name, streams)
    with recorders() as again:
        assert said(name, streams) == plain
        assert again.recorded <= 2
        assert again.replayed > 30


@pytest.mark.parametrize("name", families("qwen2_vl", "qwen2_5_vl", "smolvlm", "idefics3"))
def test_recorded_reading_of_rounds_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = said(name, 1)
    monkeypatch.setattr(recording, "ROUND_DTYPES", {torch.float32})
    lengths: list[int] = []
    run = graph._run

    def noted(decoder: Any, take: Any, *rest: Any) -> Any:
        lengths.append(take.inputs["inputs_embeds"].shape[1])
        return run(decoder, take, *rest)

    with recorders() as again:
        monkeypatch.setattr(graph, "_run", noted)
        assert said(name, 1) == plain
        assert 2 <= again.recorded <= 4
    assert sum(length > 1 for length in lengths) >= 8


def test_rounds_that_cannot_be_recorded_leave_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = said(ANY, 1)
    monkeypatch.setattr(recording, "ROUND_DTYPES", {torch.float32})

    class Refusing(Again):
        def __init__(self, run: Any, device: torch.device, pool: list[Any]) -> None:
            if run.args[3].step.tokens > 1:
                raise RuntimeError("operation not permitted when stream is capturing")
            super().__init__(run, device, pool)

    with recorders(Refusing) as again:
        assert said(ANY, 1) == plain
        assert again.recorded == 1
        assert again.replayed > 30


@pytest.mark.parametrize("name", families("qwen2_5_vl", "idefics3"))
def test_short_cuts_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need("cpu")
    plain = said(name, 1)
    turns: list[int] = []
    turned = shortcuts.Turn.__call__
    monkeypatch.setattr(shortcut, "DEVICES", {"cpu"})
    monkeypatch.setattr(shortcuts.Turn, "__call__", lambda *args: turns.append(args[1].shape[2]) or turned(*args))
    assert said(name, 1) == plain
    assert max(turns) > 8
    assert 1 in turns
