"""The cache's contract with transformers, and what it says when it is used wrongly."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_longctx as lc
from hf_longctx.testing import feed, tiny_llama

MODEL = tiny_llama()
IDS = torch.randint(8, 64, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cache() -> Any:
    with lc.patched(MODEL, lc.StreamingLLM(sinks=2, window=6)):
        yield feed(MODEL, IDS, [20, 1, 1])[1]


def test_what_transformers_asks(cache: lc.LongContextCache) -> None:
    assert cache.get_seq_length() == 22
    assert cache.get_mask_sizes(3, 0) == (25, 0)
    assert cache.batch_size == 2
    assert len(cache) == len(cache.layers) == 2
    assert cache.is_initialized
    assert not any(layer.is_sliding for layer in cache.layers)
    assert cache.get_max_length() == -1


def test_bytes_are_those_of_the_tensors(cache: lc.LongContextCache) -> None:
    tensors = [x for stack in cache.stacks for _, store in stack.stores for x in (store.k, store.v)]
    assert cache.kv_bytes == sum(x.untyped_storage().nbytes() for x in tensors) == cache.ledger.kv_bytes
    assert cache.ledger.stored == 8


def test_a_failed_call_is_not_counted_and_blocks_the_next(cache: lc.LongContextCache) -> None:
    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    hook = MODEL.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError), torch.no_grad():
        MODEL(IDS[:, 22:], past_key_values=cache)
    hook.remove()
    assert cache.get_seq_length() == 22
    with pytest.raises(RuntimeError, match="expected every call to run to its end"), torch.no_grad():
        MODEL(IDS[:, 22:], past_key_values=cache)
    cache.reset()
    with torch.no_grad():
        again = MODEL(IDS, past_key_values=cache).logits
        assert torch.equal(again, MODEL(IDS, use_cache=True).logits)


def test_another_batch_size_is_refused(cache: lc.LongContextCache) -> None:
    with pytest.raises(ValueError, match="expected a batch of 2 rows, as in the calls before; got 1"), torch.no_grad():
        MODEL(IDS[:1, 22:], past_key_values=cache)


@pytest.mark.parametrize("count", [1, -23])
def test_crop_takes_minus_a_number_of_tokens(cache: lc.LongContextCache, count: int) -> None:
    with pytest.raises(ValueError, match=f"expected a number from -22 to 0 .*; got {count}"):
        cache.crop(count)


def test_a_refused_crop_changes_nothing(cache: lc.LongContextCache) -> None:
    with pytest.raises(ValueError, match=r"left the window of 6 for good; got 3\. Call cache\.activate_past_recording"):
        cache.crop(-3)
    with torch.no_grad():
        got = MODEL(IDS[:, 22:], past_key_values=cache).logits
    whole, _ = feed(MODEL, IDS, [30])
    torch.testing.assert_close(got, whole[:, 22:])


def test_offloading_is_refused(cache: lc.LongContextCache) -> None:
    for call in (cache.layers[0].offload, cache.layers[0].prefetch):
        with pytest.raises(lc.UnsupportedError, match="got a request to offload"):
            call()


def test_a_cache_of_another_plan_is_refused(cache: lc.LongContextCache) -> None:
    lc.patch(MODEL, "dense")
    with pytest.raises(TypeError, match="expected a cache of plan 'dense', which is in force"), torch.no_grad():
        MODEL(IDS[:, 22:], past_key_values=cache)


def test_recording_outlives_a_reset() -> None:
    with lc.patched(MODEL, lc.StreamingLLM(sinks=2, window=6)) as model, torch.no_grad():
        cache = lc.LongContextCache(lc.report(model).plan if hasattr(lc.report(model), "plan") else None)
        cache.activate_past_recording()
        model(IDS, past_key_values=cache)
        cache.reset()
        model(IDS, past_key_values=cache)
        cache.crop(-20)
        got = model(IDS[:, 10:], past_key_values=cache).logits
        whole, _ = feed(model, IDS, [30])
    torch.testing.assert_close(got, whole[:, 10:])
