"""What a session holds is what the stock model makes of the kept tokens, at the positions that it gives them itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_longctx as lc
from hf_longctx.streaming.session import Session

from .vlms import ANY, BY_NAME, Vlm, Watched, clip, families

SMALL: dict[str, Any] = {"window_s": 3, "text_sink": 90, "text_window": 90, "max_new_tokens": 5, "query": "Go on."}


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error < 2e-5, f"relative error {error:.1e}"


def stock(vlm: Vlm, watched: Watched, layers: int) -> torch.Tensor:
    """Logits of the last kept token, by the untouched model, from nothing."""
    model, _ = vlm.make(layers)
    with torch.no_grad():
        return model(**watched.inputs()).logits[:, -1]


@pytest.mark.parametrize("name", families())
def test_with_one_layer_every_call_equals_encoding_what_is_kept(name: str) -> None:
    """One layer leaves nothing of what an evicted token did; text, pictures and a pinned question go and stay."""
    vlm = BY_NAME[name]
    with Session(*vlm.make(1), **SMALL) as session:
        watched = Watched(session)
        for event in session.run(clip(9)):
            assert_close(watched.logits, stock(vlm, watched, 1))
            if event.round == 4:
                session.ask("Who?")
                assert_close(watched.logits, stock(vlm, watched, 1))
        kinds = [(held.kind, held.number) for held in session.engine.rows[0].spans if not held.pinned]
        assert [number for kind, number in kinds if kind == "vision"] == [6, 7, 8]
        numbers = [number for kind, number in kinds if kind == "text"]
        assert numbers[0] == 0
        assert numbers != list(range(10)), "text went from between sink and window"


@pytest.mark.parametrize("name", families())
def test_with_windows_that_hold_all_it_is_the_stock_model(name: str) -> None:
    vlm = BY_NAME[name]
    with Session(*vlm.make(2), max_new_tokens=5) as session:
        watched = Watched(session)
        for _ in session.run(clip(4)):
            assert_close(watched.logits, stock(vlm, watched, 2))
        assert len(session.engine.rows[0].spans) == 9


@pytest.mark.parametrize("name", families("qwen2_vl", "qwen2_5_vl", "qwen3_vl"))
def test_positions_are_those_of_the_models_own_routine(name: str) -> None:
    """Sizes and rates change, so that no two rounds take the same room."""
    model, processor = BY_NAME[name].make(1)
    with Session(model, processor, **SMALL) as session:
        watched = Watched(session)
        frames = [*clip(3), *clip(3, fps=4, size=(40, 64), t=3), *clip(3, fps=1, size=(64, 16), t=6)]
        for _ in session.run(frames):
            given = watched.inputs()
            grids = {key: x for key, x in given.items() if "grid" in key}
            expected, _ = model.model.get_rope_index(given["input_ids"], given["mm_token_type_ids"], **grids)
            assert session.engine.cache.angles is not None
            got = session.engine.cache.angles.positions[..., : expected.shape[-1]]
            assert torch.equal(got, expected)
            assert session.engine.rows[0].next == int(expected[0, 0, -1]) + 1


def test_keys_of_the_second_layer_are_kept_as_they_were() -> None:
    """With two layers a kept token remembers what it saw: its keys are moved, never made anew."""
    model, processor = BY_NAME[ANY].make(2)
    with Session(model, processor, **SMALL) as session:
        seen: dict[tuple[str, int], torch.Tensor] = {}
        for _ in session.run(clip(8)):
            [(_, store)] = session.engine.cache.stacks[1].stores
            assert isinstance(store.k, torch.Tensor)
            slot = 0
            for held in session.engine.rows[0].spans[:-1]:
                keys = store.k[:, :, slot : slot + len(held.ids)]
                known = seen.setdefault((held.kind, held.number if not held.pinned else -1), keys.clone())
                assert torch.equal(known, keys[:, :, : known.shape[2]])
                slot += len(held.ids)


def test_unpatched_again_the_model_is_the_very_same() -> None:
    model, processor = BY_NAME[ANY].make()
    ids = torch.randint(0, 200, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(ids).logits
        with Session(model, processor) as session:
            list(session.run(clip(2)))
        assert torch.equal(model(ids).logits, before)
        lc.patch(model, "dense")
        with Session(model, processor) as session:
            list(session.run(clip(2)))
        assert lc.report(model).method == "dense"
