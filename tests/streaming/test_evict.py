"""`evict(cache, room=n)`: the oldest go, what is left closes up, and the next n tokens push nothing out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_longctx as lc
from hf_longctx.models import inspect_model
from hf_longctx.testing import feed, key_positions, oracle_logits, tiny_llama

from . import draws

MODEL = tiny_llama()


def policy(sinks: int, window: int) -> lc.HeadPolicy:
    return lc.HeadPolicy(lc.SinkWindow(sinks, window), lc.InCache())


@st.composite
def chats(draw: st.DrawFn) -> tuple[list[int], dict[int, int], torch.Tensor | None, int, int]:
    """Calls, rooms by call, padding mask, sinks and window."""
    sinks, window = draw(st.integers(0, 4)), draw(st.integers(1, 16))
    calls = draw(st.lists(st.integers(1, 20), min_size=2, max_size=6))
    rooms = draw(st.dictionaries(st.integers(1, len(calls) - 1), st.integers(0, window), min_size=1, max_size=3))
    return calls, rooms, draw(draws.padding(sum(calls))), sinks, window


@settings(max_examples=40)
@given(chats())
def test_evicted_tokens_are_gone_and_the_rest_closes_up(
    chat: tuple[list[int], dict[int, int], torch.Tensor | None, int, int],
) -> None:
    calls, rooms, mask, sinks, window = chat
    ids = draws.tokens(1 if mask is None else len(mask), sum(calls), seed=0)
    plan = lc.StreamingLLM(sinks, window).plan(inspect_model(MODEL))
    oracle = oracle_logits(MODEL, plan, ids, mask, calls=calls, rooms=rooms)
    with lc.patched(MODEL, plan):
        got, _ = feed(MODEL, ids, calls, mask, rooms)
    draws.assert_equal(MODEL, got, oracle, sinks + window, mask)


@pytest.mark.parametrize("room", [0, 5, 16])
def test_the_next_tokens_push_nothing_out(room: int) -> None:
    """The oracle's own words on it: from the eviction on, `room` tokens see all that was left and each other."""
    seen = key_positions(policy(4, 16), [40, *[1] * room], rooms={1: room}) >= 0
    left = [*range(4), *range(40 - (16 - room), 40)]
    for token in range(40, 40 + room):
        assert seen[token].nonzero()[:, 0].tolist() == [*left, *range(40, token + 1)]


def test_by_the_model_as_by_its_cache() -> None:
    ids = draws.tokens(1, 60, seed=0)
    with lc.patched(MODEL, lc.StreamingLLM(sinks=4, window=16)), torch.no_grad():
        by_cache, _ = feed(MODEL, ids, [40, 20], rooms={1: 12})
        cache = MODEL(ids[:, :40], use_cache=True).past_key_values
        lc.evict(MODEL, room=12)
        by_model = MODEL(ids[:, 40:], past_key_values=cache).logits
    assert torch.equal(by_cache[:, 40:], by_model)


def test_rows_keep_their_evictions_when_they_move() -> None:
    ids = draws.tokens(2, 60, seed=0)
    mask = (torch.arange(60) >= torch.tensor([0, 23])[:, None]).long()
    plan = lc.StreamingLLM(sinks=4, window=16).plan(inspect_model(MODEL))
    oracle = oracle_logits(MODEL, plan, ids, mask, calls=[40, 20], rooms={1: 12})
    with lc.patched(MODEL, plan), torch.no_grad():
        cache = MODEL(ids[:, :40], attention_mask=mask[:, :40], use_cache=True).past_key_values
        cache.evict(room=12)
        cache.reorder_cache(torch.tensor([1, 0]))
        got = MODEL(ids[:, 40:].flip(0), attention_mask=mask.flip(0), past_key_values=cache).logits
    draws.assert_equal(MODEL, got.flip(0), oracle[:, 40:], 20)


@pytest.mark.parametrize("room", [-1, 17])
def test_room_must_fit_the_window(room: int) -> None:
    with lc.patched(MODEL, lc.StreamingLLM(sinks=4, window=16)), torch.no_grad():
        cache = MODEL(draws.tokens(1, 30, seed=0), use_cache=True).past_key_values
        with pytest.raises(ValueError, match=f"expected room between 0 and the window of 16; got {room}"):
            lc.evict(cache, room=room)


def test_nothing_to_evict_from() -> None:
    with lc.patched(MODEL, lc.Dense()), torch.no_grad():
        cache = MODEL(draws.tokens(1, 30, seed=0), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="nothing to make room in"):
            lc.evict(cache, room=1)
    with pytest.raises(ValueError, match="expected a patched model with a live cache; got none"):
        lc.evict(MODEL, room=1)


def test_crop_below_what_was_evicted() -> None:
    """Tokens that take the place of cropped ones are new: they were never evicted."""
    ids = draws.tokens(1, 60, seed=0)
    plan = lc.StreamingLLM(sinks=4, window=16).plan(inspect_model(MODEL))
    text = torch.cat((ids[:, :35], ids[:, 40:]), 1)
    oracle = oracle_logits(MODEL, plan, text, calls=[35, 20], rooms={1: 16})
    cache = lc.LongContextCache(plan)
    cache.activate_past_recording()
    with lc.patched(MODEL, plan), torch.no_grad():
        MODEL(ids[:, :40], past_key_values=cache)
        cache.evict(room=16)
        cache.crop(-5)
        got = MODEL(ids[:, 40:], past_key_values=cache).logits
    draws.assert_equal(MODEL, got, oracle[:, 35:], 20)
