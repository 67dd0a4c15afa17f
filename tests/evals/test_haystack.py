from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_longctx.evals import text
from hf_longctx.evals.haystack import Haystack


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(depths=st.lists(st.floats(0, 1), max_size=5), room=st.integers(1, 500), start=st.integers(0, 10_000))
def test_needles_are_where_it_says_and_the_text_around_them_is_whole(
    tiny: tuple[Any, Any], depths: list[float], room: int, start: int
) -> None:
    hay = Haystack(tiny[1], text.shipped()[:3_000])
    needles = [(depth, [-1 - which] * (which + 1)) for which, depth in enumerate(depths)]
    ids, spans = hay.hide(needles, room, start)
    for (_, needle), (first, end) in zip(needles, spans, strict=True):
        assert ids[first:end] == needle
    assert [i for i in ids if i >= 0] == [hay.ids[(start + i) % len(hay.ids)] for i in range(room)]
    order = sorted(range(len(depths)), key=lambda which: depths[which])
    assert [spans[which][0] for which in order] == sorted(first for first, _ in spans)


def test_a_needle_follows_a_full_stop(tiny: tuple[Any, Any]) -> None:
    hay = Haystack(tiny[1], text.shipped())
    ids, spans = hay.hide([(0.3, [-1]), (0.7, [-1])], 900, 5)
    for first, _ in spans:
        assert tiny[1].decode(ids[first - 1]).endswith(".")
