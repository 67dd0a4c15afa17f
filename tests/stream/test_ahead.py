"""A step that begins before the last word is known changes nothing, also where that word ends the turn."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import transformers as hf

from hf_longctx.stream import Session
from hf_longctx.streaming import engine
from hf_longctx.streaming.sampling import Draws, Sampler

from .vlms import BY_NAME, clip, families

SMALL: dict[str, Any] = {"window_s": 3, "text_sink": 90, "text_window": 90, "max_new_tokens": 6, "query": "Go on."}
DRAWN = {"do_sample": True, "temperature": 2.0, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.2}


def watched(vlm: tuple[Any, Any], stop: int | None, **generation: Any) -> tuple[list[Any], Any, torch.Tensor]:
    """What a session says, what it is at the end, and where its tokens stand."""
    with Session(*vlm, **SMALL, generation=hf.GenerationConfig(**generation)) as session:
        if stop is not None:
            session.engine._stops.add(stop)
        events = [(event.text, event.tokens, event.stopped) for event in session.run(clip(9))]
        events.append(session.ask("Who?").text)
        events += [event.text for event in session.run(clip(2))]
        state = session.state()
        state.pop("meter")
        angles = session.engine.cache.angles
        assert angles is not None
        columns = session.engine.cache.ledger.columns
        assert columns == session.engine.rows[0].tokens
        return events, state, angles.positions[..., :columns].clone()


@pytest.mark.parametrize("generation", [{}, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", families("qwen2_5_vl", "idefics3"))
def test_ahead_or_not(name: str, generation: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = BY_NAME[name].make()
    heard: list[int] = []
    own = engine.Fetched.get
    with monkeypatch.context() as patch:
        patch.setattr(engine.Fetched, "get", lambda word: heard.extend(own(word)) or own(word))
        watched(vlm, None, **generation)
    for stop in (None, Counter(heard[1:]).most_common(1)[0][0]):
        monkeypatch.setattr(engine, "AHEAD", set())
        expected = watched(vlm, stop, **generation)
        monkeypatch.setattr(engine, "AHEAD", {"cpu"})
        got = watched(vlm, stop, **generation)
        assert got[:2] == expected[:2]
        assert torch.equal(got[2], expected[2])
    assert any(event[2] == "end" for event in got[0][:9])


def test_a_draw_is_as_likely_as_the_model_says() -> None:
    sampler = Sampler(hf.GenerationConfig(do_sample=True), 0, [1])
    logits = torch.tensor([[0.0, 9.0, 1.0, float("-inf"), 2.0]])
    draws = sampler.begin(lambda: [[]], 1, 4000, torch.device("cpu"))
    found = torch.cat([draws.next(logits) for _ in range(4000)]).bincount(minlength=5) / 4000
    logits[0, 1] = float("-inf")
    torch.testing.assert_close(found, logits.softmax(-1)[0], rtol=0, atol=0.03)
    assert found[1] == found[3] == 0


def test_a_draw_at_the_edge_of_a_share_is_never_one_that_has_none() -> None:
    shares = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    heights = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)[:, None, None]
    draws = Draws(hf.LogitsProcessorList(), torch.tensor([], dtype=torch.int64), None, heights)
    assert [int(draws.next(shares)) for _ in range(3)] == [1, 3, 3]
