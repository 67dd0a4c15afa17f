"""In bfloat16, a stream is no further from float64 than the stock model is on a short text."""

from __future__ import annotations

import pytest
import torch

import hf_longctx as lc
from hf_longctx.models import inspect_model
from hf_longctx.testing import feed, oracle_logits, tiny_llama

from . import draws


def error(got: torch.Tensor, oracle: torch.Tensor) -> float:
    """Root mean square, relative: a mean over thousands of logits, so that texts of two lengths compare."""
    return float((got.double() - oracle).norm() / oracle.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("calls", [[200], [1] * 200, [50, 1, 1, 148]], ids=["prompt", "steps", "chunks"])
def test_half_precision_streams_as_exactly_as_stock(dtype: torch.dtype, calls: list[int]) -> None:
    model = tiny_llama()
    for weight in model.parameters():  # not model.to(dtype), which would round the rotary frequencies as well
        weight.data = weight.data.to(dtype)
    short, ids = draws.tokens(10, 20, seed=1), draws.tokens(1, 200, seed=0)
    with torch.no_grad():
        stock = error(model(short, use_cache=False).logits, oracle_logits(model, DENSE, short))
    plan = lc.StreamingLLM(sinks=4, window=16).plan(inspect_model(model))
    oracle = oracle_logits(model, plan, ids)
    with lc.patched(model, plan):
        got, _ = feed(model, ids, calls)
    assert error(got, oracle) <= 2 * stock


DENSE = lc.Dense().plan(inspect_model(tiny_llama()))
