"""Recorded steps of a session give what they give as they are, and stay good when spans go."""

from __future__ import annotations

from typing import Any

import pytest

from hf_longctx.stream import Session

from ..integration.again import recorders
from .vlms import BY_NAME, clip, families

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
