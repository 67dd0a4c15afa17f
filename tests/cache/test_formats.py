"""Stores in every format: what is read is what a list per row holds, by whatever way it is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_longctx as lc
from hf_longctx.cache.kv_format import Int4KV, Int8KV
from hf_longctx.cache.rows import PAGE, decoded
from hf_longctx.kernels import ops
from hf_longctx.kernels.types import parts

from .vectors import DIM, HEADS, Text, assert_reads, change, reals

FORMATS = [None, Int8KV(), Int4KV()]
RETENTIONS = st.one_of(
    st.just(lc.KeepAll()),
    st.builds(lc.SinkWindow, st.integers(0, 4), st.integers(1, 9)),
    st.builds(lc.SinkWindow, st.integers(0, 4), st.integers(1, 5), st.integers(6, 9)),
)


@pytest.mark.parametrize("kv", FORMATS, ids=["native", "int8", "int4"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@settings(max_examples=25)
@given(data=st.data(), retention=RETENTIONS)
def test_what_is_read_is_what_was_stored(kv: Any, padded: bool, data: st.DataObject, retention: Any) -> None:
    text = Text(lc.HeadPolicy(retention, lc.Absolute(), kv=kv), rows=data.draw(st.integers(1, 3)))
    text.cache.activate_past_recording()
    for _ in range(data.draw(st.integers(1, 5))):
        step, k, v = text.draw(data.draw(reals(len(text.keys), padded)))
        assert_reads(text, text.store.append(k, v, step), step)
        text.cache.commit(step)
        change(text, data, crops=retention.window is None)


@pytest.mark.parametrize("kv", FORMATS, ids=["native", "int8", "int4"])
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@settings(max_examples=25)
@given(data=st.data())
def test_memory_holds_each_position_in_its_column(kv: Any, padded: bool, data: st.DataObject) -> None:
    text = Text(lc.HeadPolicy(lc.KeepAll(), lc.Absolute(), kv=kv), rows=data.draw(st.integers(1, 3)))
    for _ in range(data.draw(st.integers(1, 5))):
        step, k, v = text.draw(data.draw(reals(len(text.keys), padded)))
        assert text.store.write(k, v, step) is None
        text.cache.commit(step)
        for stored, lists in zip(text.store.memory, (text.keys, text.values), strict=True):
            assert stored.shape[:2] == (len(lists), HEADS)
            for row, expected in enumerate(lists):
                for pos, token in enumerate(expected):
                    assert torch.equal(decoded(stored)[row, :, pos], token)
        assert text.store.locate(torch.zeros(1, 1, 1, 1, dtype=torch.int32), 16, step) is None
        change(text, data)


@pytest.mark.parametrize(("kv", "bits"), [(Int8KV(), 8), (Int4KV(), 4)], ids=["int8", "int4"])
def test_bytes_are_bits_of_the_channels_and_four_bytes_a_token(kv: Any, bits: int) -> None:
    text = Text(lc.HeadPolicy(lc.KeepAll(), lc.Absolute(), kv=kv), rows=3)
    step, k, v = text.draw(torch.ones(3, PAGE, dtype=torch.bool))
    text.store.append(k, v, step)
    live = sum(x.untyped_storage().nbytes() for stored in text.store.memory for x in parts(stored))
    assert text.store.kv_bytes == live == 2 * 3 * HEADS * PAGE * (DIM * bits // 8 + 4)
    assert text.store.k.shape == (3, HEADS, PAGE, DIM)


def test_a_format_changes_what_is_read() -> None:
    """The tests above would pass if nothing was ever quantized."""
    x = torch.randn(1, 2, 3, DIM)
    errors = [(ops.decode_kv(ops.encode_kv(x, bits)) - x).abs().max() for bits in (8, 4)]
    assert 1e-4 < errors[0] < 0.02 < errors[1] < 0.5


@pytest.mark.parametrize("kv", FORMATS, ids=["native", "int8", "int4"])
def test_gradients_pass_through_the_format(kv: Any) -> None:
    text = Text(lc.HeadPolicy(lc.KeepAll(), lc.Absolute(), kv=kv), rows=1)
    step, k, v = text.draw(torch.ones(1, 5, dtype=torch.bool))
    weight = torch.randn(k.shape)
    view = text.store.append(k.requires_grad_(), v.requires_grad_(), step)
    ((view.k + view.v) * weight).sum().backward()
    assert torch.equal(k.grad, weight)
    assert torch.equal(v.grad, weight)
    assert not any(x.requires_grad for stored in text.store.memory for x in parts(stored))
