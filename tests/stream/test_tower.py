"""A tower whose layers are recorded gives what it gives as it is, for every family and every size of pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_longctx.stream import Session
from hf_longctx.streaming import tower as room

from .vlms import BY_NAME, clip, families

SMALL: dict[str, Any] = {"window_s": 3, "text_sink": 90, "text_window": 90, "max_new_tokens": 5, "query": "Go on."}


class Tape:
    """A stand-in for a CUDA graph: what was recorded is computed again, and its results are put where they were."""

    nbytes = 1
    made = played = 0

    def __init__(self, run: Callable[[], Any], device: torch.device, pool: list[Any]) -> None:
        self._run, self._outs = run, run()
        Tape.made += 1

    @staticmethod
    def first(run: Callable[[], Any], device: torch.device) -> Any:
        """As `Graph.first`."""
        return run()

    def replay(self) -> Any:
        """As `Graph.replay`."""
        Tape.played += 1
        take, outs = self._run.args[0], self._outs  # type: ignore[attr-defined]
        made = self._run()
        for out, fresh in zip(outs, made, strict=True):
            out.copy_(fresh)
        take.outs = outs
        return outs


def deep(name: str) -> tuple[Any, Any]:
    """A model whose tower has four layers, of which not all attend alike."""
    model, processor = BY_NAME[name].make()
    config = model.config
    depth = "depth" if hasattr(config.vision_config, "depth") else "num_hidden_layers"
    setattr(config.vision_config, depth, 4)
    if hasattr(config.vision_config, "fullatt_block_indexes"):
        config.vision_config.fullatt_block_indexes, config.vision_config.window_size = [1, 3], 32
    torch.manual_seed(1)
    return type(model)(config).eval(), processor


def said(vlm: tuple[Any, Any]) -> list[str]:
    """Rounds of one size, of another, and of the first again."""
    frames = [*clip(4, size=(64, 64)), *clip(4, size=(40, 64), seed=1, t=4), *clip(3, size=(64, 64), seed=2, t=8)]
    with Session(*vlm, **SMALL) as session:
        return [event.text for event in session.run(frames)]


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> type[Tape]:
    """Record towers on the CPU."""
    Tape.made = Tape.played = 0
    monkeypatch.setitem(room.RECORDERS, "cpu", Tape)
    return Tape


def features(vlm: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the text side is given of the pictures of each round."""
    seen: list[torch.Tensor] = []
    decoder = vlm[0].get_decoder()

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["inputs_embeds"].shape[1] > 1:
            seen.append(kwargs["inputs_embeds"].clone())

    hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
    said(vlm)
    hook.remove()
    return seen


@pytest.mark.parametrize("name", families())
def test_recorded_pictures_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch, taped: type[Tape]) -> None:
    vlm = deep(name)
    with monkeypatch.context() as patch:
        patch.delitem(room.RECORDERS, "cpu")
        expected = features(vlm, monkeypatch)
    assert taped.made == 0
    got = features(vlm, monkeypatch)
    assert 1 <= taped.made <= 2
    assert 11 - 2 <= taped.played <= 11  # once a round
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
