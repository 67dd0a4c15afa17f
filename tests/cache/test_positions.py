"""Where keys are read: the closed formulas against counting, and the reading of a query against the paper's rule."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

import hf_longctx as lc
from hf_longctx.cache.positions import lap_position, sink_position
from hf_longctx.testing import key_positions


@given(st.integers(-3, 10**8), st.integers(0, 9), st.integers(1, 3000))
def test_lap_positions_are_small_and_a_whole_number_of_laps_away(pos: int, offset: int, lap: int) -> None:
    found = int(lap_position(torch.tensor([pos]), offset, lap))
    assert found <= pos
    assert (pos - found) % lap == 0
    assert found < offset + lap
    assert found == pos or found >= offset


@given(st.integers(0, 6), st.integers(1, 12), st.integers(0, 40), st.integers(0, 12))
def test_sinks_are_seen_from_the_querys_place_among_what_it_sees(sink: int, window: int, pos: int, room: int) -> None:
    evicted = min(room, window)
    floor = pos - (window - evicted)  # as `evict(room)` sets it when the query is the next token
    for oldest in (None, floor):
        seen = [p for p in range(pos + 1) if p < sink or (pos - p < window and (oldest is None or p >= oldest))]
        known = None if oldest is None else torch.tensor([[oldest]])
        assert int(sink_position(torch.tensor([[pos]]), sink, window, known)) == seen.index(pos)


@given(st.integers(0, 6), st.integers(1, 12), st.integers(1, 12))
def test_laps_and_turns_give_the_distances_of_the_paper(sink: int, window: int, more: int) -> None:
    """The distance that a query is turned to is the distance between places among the visible keys."""
    lap, total = window + more - 1, 60
    places = key_positions(lc.HeadPolicy(lc.SinkWindow(sink, window), lc.InCache()), [total])
    at = lap_position(torch.arange(total), sink, lap)
    far = sink_position(torch.arange(total)[None], sink, window, None)[0]
    for query in range(total):
        for key in places[query].ge(0).nonzero()[:, 0].tolist():
            paper = int(places[query, query] - places[query, key])
            if key < sink:
                assert int(far[query] - at[key]) == paper
            else:
                assert int(at[query] - at[key]) in (paper, paper - lap)
