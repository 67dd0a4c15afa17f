"""A tower whose layers are recorded gives what it gives as it is, for every family and every size of pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hf_longctx.stream import Frame, Session
from hf_longctx.streaming import tower as room

from ..operators import needs_torchvision
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


def deep(name: str, whole: Sequence[int] = (1, 3), window: int = 32) -> tuple[Any, Any]:
    """A model whose tower has four layers, of which not all attend alike."""
    model, processor = BY_NAME[name].make()
    config = model.config
    depth = "depth" if hasattr(config.vision_config, "depth") else "num_hidden_layers"
    setattr(config.vision_config, depth, 4)
    if hasattr(config.vision_config, "fullatt_block_indexes"):
        config.vision_config.fullatt_block_indexes, config.vision_config.window_size = list(whole), window
    torch.manual_seed(1)
    return type(model)(config).eval(), processor


@pytest.fixture
def taped(monkeypatch: pytest.MonkeyPatch) -> type[Tape]:
    """Record towers on the CPU."""
    Tape.made = Tape.played = 0
    monkeypatch.setitem(room.RECORDERS, "cpu", Tape)
    return Tape


def features(vlm: tuple[Any, Any], frames: list[Frame]) -> list[torch.Tensor]:
    """What the text side is given of the pictures of each round."""
    seen: list[torch.Tensor] = []
    decoder = vlm[0].get_decoder()

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["inputs_embeds"].shape[1] > 1:
            seen.append(kwargs["inputs_embeds"].clone())

    hook = decoder.register_forward_pre_hook(note, with_kwargs=True)
    with Session(*vlm, **SMALL) as session:
        for _ in session.run(frames):
            pass
    hook.remove()
    return seen


@pytest.mark.parametrize("name", families())
def test_recorded_pictures_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch, taped: type[Tape]) -> None:
    vlm = deep(name)
    frames = [*clip(4, size=(64, 64)), *clip(4, size=(40, 64), seed=1, t=4), *clip(3, size=(64, 64), seed=2, t=8)]
    with monkeypatch.context() as patch:
        patch.delitem(room.RECORDERS, "cpu")
        expected = features(vlm, frames)
    assert taped.made == 0
    got = features(vlm, frames)
    assert 1 <= taped.made <= 2
    assert 11 - 2 <= taped.played <= 11  # once a round
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@needs_torchvision
def test_pictures_that_turn_are_not_taken_for_those_before(monkeypatch: pytest.MonkeyPatch, taped: type[Tape]) -> None:
    """As many patches, whose first layer attends alike, and whose windows are others."""
    vlm = deep("qwen2_5_vl", [0, 2], 48)
    frames = [*clip(4, size=(64, 128)), *clip(3, size=(128, 64), seed=1, t=4)]
    with monkeypatch.context() as patch:
        patch.delitem(room.RECORDERS, "cpu")
        expected = features(vlm, frames)
    got = features(vlm, frames)
    assert (taped.made, taped.played) == (1, 4)  # the second to the fourth round, and the fifth, in vain
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
