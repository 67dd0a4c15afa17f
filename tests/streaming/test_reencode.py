"""With one layer nothing is left of what an evicted token did: streaming is the stock model on `[sinks, window]`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_longctx as lc
from hf_longctx.testing import feed, tiny_llama

from . import draws

ROPES = {
    "default": {},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}


def one_layer(kind: str, groups: int) -> torch.nn.Module:
    rope = {"rope_type": kind, "rope_theta": 1000.0, **ROPES[kind]}
    return tiny_llama(num_hidden_layers=1, num_key_value_heads=4 // groups, rope_parameters=rope)


MODELS = {kind: one_layer(kind, groups) for kind, groups in (("default", 1), ("yarn", 2), ("llama3", 4))}


@pytest.mark.parametrize("kind", list(ROPES))
@settings(max_examples=8)
@given(st.data(), st.integers(0, 5), st.integers(1, 20))
def test_every_step_equals_encoding_what_is_left(kind: str, data: st.DataObject, sinks: int, window: int) -> None:
    total = 48
    model, ids = MODELS[kind], draws.tokens(1, total, data.draw(st.integers(0, 9)))
    with torch.no_grad():
        stock = []
        for end in range(1, total + 1):
            left = ids[:, :end] if end <= sinks + window else torch.cat((ids[:, :sinks], ids[:, end - window : end]), 1)
            stock.append(model(left, use_cache=False).logits[:, -1])
    with lc.patched(model, lc.StreamingLLM(sinks=sinks, window=window)):
        got, _ = feed(model, ids, data.draw(draws.calls(total)))
    draws.assert_equal(model, got, torch.stack(stock, 1).double(), sinks + window)
