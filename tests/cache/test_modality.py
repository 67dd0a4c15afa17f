"""What `ModalityWindow` keeps, and a cache whose spans go from its middle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_longctx as lc
from hf_longctx.cache.cache import LongContextCache
from hf_longctx.cache.spans import Span
from hf_longctx.cache.store import Store


@st.composite
def streams(draw: st.DrawFn) -> list[Span]:
    """Spans as a stream brings them, with texts and pictures of all sizes, some pinned."""
    spans, counts = [], {"text": 0, "vision": 0}
    for t in range(draw(st.integers(1, 25))):
        kind: Any = draw(st.sampled_from(["text", "vision"]))
        pinned = kind == "text" and draw(st.integers(0, 9)) == 0
        spans.append(Span(kind, draw(st.integers(1, 9)), 0 if pinned else counts[kind], float(t), pinned))
        counts[kind] += not pinned
    return spans


def literal(window: lc.ModalityWindow, spans: list[Span]) -> list[bool]:
    """The rules one by one, span after span."""
    text = [span for span in spans if span.kind == "text" and not span.pinned]
    vision = [span for span in spans if span.kind == "vision"]
    left = window.text_sink - sum(span.tokens for span in spans if span.pinned)
    sinks: list[Span] = []
    while len(sinks) < len(text) and text[len(sinks)].number == len(sinks):
        if sum(span.tokens for span in sinks) + text[len(sinks)].tokens > left:
            break
        sinks.append(text[len(sinks)])

    def fits(span: Span, all_: list[Span], most: float) -> bool:
        after = all_[all_.index(span) :]
        return span is all_[-1] or sum(other.tokens for other in after) <= most

    def stays(span: Span) -> bool:
        if span.pinned:
            return True
        if span.kind == "text":
            return span in sinks or fits(span, text, window.text_window)
        recent = span.t > vision[-1].t - window.vision_seconds
        return recent and fits(span, vision, window.vision_tokens or float("inf"))

    return [stays(span) for span in spans]


@settings(max_examples=300)
@given(streams(), st.integers(1, 30), st.integers(1, 30), st.floats(0.5, 12), st.none() | st.integers(1, 30))
def test_what_stays_is_what_the_rules_say(
    spans: list[Span], sink: int, window: int, seconds: float, cap: int | None
) -> None:
    retention = lc.ModalityWindow(sink, window, seconds, cap)
    assert list(retention.keep(spans)) == literal(retention, spans)


@settings(max_examples=100)
@given(streams(), st.integers(1, 30), st.integers(1, 30), st.floats(0.5, 12), st.none() | st.integers(1, 30))
def test_what_went_is_never_missed_again(
    spans: list[Span], sink: int, window: int, seconds: float, cap: int | None
) -> None:
    """To let spans go as they come leaves what letting them go at the end does, and doing it twice changes nothing."""
    retention = lc.ModalityWindow(sink, window, seconds, cap)
    held: list[Span] = []
    for span in spans:
        both = [*held, span]
        held = [one for one, stays in zip(both, retention.keep(both), strict=True) if stays]
        assert all(retention.keep(held))
    if not any(span.pinned for span in spans):
        assert held == [one for one, stays in zip(spans, retention.keep(spans), strict=True) if stays]
        text = sum(span.tokens for span in held if span.kind == "text")
        assert text <= sink + max(window, *(span.tokens for span in spans))


def plan() -> lc.Plan:
    policy = lc.HeadPolicy(lc.ModalityWindow(), lc.Contiguous())
    return lc.Plan("x", (lc.LayerPlan((lc.HeadGroup((0, 1), policy),)),))


def fill(cache: LongContextCache, rows: int, tokens: int, axes: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Keys that say where they were: `[rows, 2, tokens, 8]`; positions that count up by two."""
    step = cache.begin(tokens, rows, torch.device("cpu"), mask)
    keys = torch.arange(rows * 2 * tokens * 8.0).view(rows, 2, tokens, 8)
    [(_, store)] = cache.stacks[0].stores
    store.append(keys, keys + 0.5, step)
    pos = 2 * step.pos.expand(rows, -1)
    assert cache.angles is not None
    cos, sin = angles(pos if axes == 1 else pos.expand(axes, -1, -1))
    cache.angles.put(pos if axes == 1 else pos.expand(axes, -1, -1), cos, sin, step)
    cache.commit(step)
    return keys


def angles(pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat = (pos if pos.ndim == 2 else pos.sum(0)).float()[..., None].expand(-1, -1, 8)
    return flat.cos(), flat.sin()


@pytest.mark.parametrize("axes", [1, 3])
def test_what_is_kept_moves_up_in_place(axes: int) -> None:
    cache = LongContextCache(plan())
    keys = fill(cache, 2, 10, axes)
    [(_, store)] = cache.stacks[0].stores
    assert isinstance(store, Store)
    before, size = store.k, cache.kv_bytes
    index = torch.tensor([[0, 1, 5, 6, 9], [0, 2, 3, 4, 4]])
    cache.keep(index, torch.tensor([5, 4]), torch.tensor([[0, 0, 6, 6, 10], [0, 2, 2, 2, 2]]), angles)
    assert store.k is before, "what was recorded must still find it"
    assert cache.kv_bytes == size
    assert isinstance(store.k, torch.Tensor)
    assert torch.equal(store.k[0, :, :5], keys[0, :, [0, 1, 5, 6, 9]])
    assert torch.equal(store.k[1, :, :4], keys[1, :, [0, 2, 3, 4]])
    assert cache.angles is not None
    expected = torch.tensor([[0, 2, 4, 6, 8], [0, 2, 4, 6, 6]])
    assert torch.equal(cache.angles.positions[..., :5], expected.expand(axes, -1, -1))
    cos, sin = cache.angles.view(5)
    assert torch.equal(cos, angles(expected if axes == 1 else expected.expand(3, -1, -1))[0])
    assert torch.equal(sin, angles(expected if axes == 1 else expected.expand(3, -1, -1))[1])
    assert (cache.ledger.columns, cache.ledger.gone) == (5, 5)
    assert cache.get_seq_length() == 5
    step = cache.begin(2, 2, torch.device("cpu"), torch.tensor([[1] * 5 + [1, 1], [1] * 4 + [0, 0, 1]]))
    assert step.pos.tolist() == [[5, 6], [4, -1]]


def test_every_head_of_a_plan_is_rotated_at_read_or_none() -> None:
    at_read = lc.HeadPolicy(lc.ModalityWindow(), lc.Contiguous())
    for other in (
        lc.HeadPolicy(lc.KeepAll(), lc.Absolute()),
        lc.HeadPolicy(lc.SinkWindow(0, 8), lc.Contiguous()),
        lc.HeadPolicy(lc.ModalityWindow(), lc.Contiguous(), kv=lc.Int8KV()),
    ):
        with pytest.raises(ValueError, match="expected heads that store native keys un-rotated and read them all"):
            lc.Plan("x", (lc.LayerPlan((lc.HeadGroup((0,), at_read), lc.HeadGroup((1,), other))),))
    assert lc.Plan.from_json(plan().to_json()) == plan()


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"text_sink": 0}, "expected text_sink as a whole number of tokens >= 1; got 0"),
        ({"text_window": 1.5}, "expected text_window as a whole number of tokens >= 1; got 1.5"),
        ({"vision_seconds": 0}, "expected vision_seconds as a number > 0; got 0"),
        ({"vision_tokens": True}, "expected vision_tokens as a whole number >= 1 or None; got True"),
    ],
)
def test_sizes_that_are_none_are_refused(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lc.ModalityWindow(**knobs)


def test_a_step_of_padding_alone_stores_nothing() -> None:
    cache = LongContextCache(plan())
    fill(cache, 2, 4, 3, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))
    assert cache.ledger.row_lengths.tolist() == [4, 0]
    assert cache.angles is not None
    assert cache.angles.positions[:, 0, :4].tolist() == [[0, 2, 4, 6]] * 3
