"""`report` in numbers, and prompts that do not fit."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

import hf_longctx as lc
from hf_longctx import memory
from hf_longctx.kernels.types import Selection
from hf_longctx.patch import state_of

from ..methods.cases import LIMITS, LOSSY, SELECTING, Row, named, pairs
from .cases import BY_NAME
from .test_generate import batch, generate
from .tiny import Case

LLAMA = BY_NAME["llama"]
SOME = tuple(BY_NAME[name] for name in ("llama", "llama_wide_heads", "gemma3", "gpt_neox", "falcon_multi_query", "mpt"))


def live(cache: Any) -> int:
    """Bytes of every tensor of keys, values and summaries that the cache holds, counted one by one."""
    stores = [store for layer in cache.layers for _, store in layer.stores]
    kept = sum(x.nbytes for store in stores for x in (store.k, store.v))
    found = (vars(store.index).values() for store in stores if store.index is not None)
    return kept + sum(x.nbytes for values in found for x in values if isinstance(x, torch.Tensor))


def bytes_per_token(model: Any) -> int:
    """Keys and values of one token, as the unpatched model caches them."""
    with torch.no_grad():
        cache = model(torch.tensor([[9]])).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize(("row", "case"), pairs((*LIMITS, *LOSSY), SOME), ids=named)
@torch.no_grad()
def test_bytes_and_tokens(row: Row, case: Case) -> None:
    model = lc.patch(case.make(), row.method(case))
    cache = model(case.prompt(50, rows=3)).past_key_values
    report = lc.report(model)
    assert report.live
    assert report.kv_bytes == live(cache)
    assert report.dense_kv_bytes == 3 * 50 * bytes_per_token(case.make())
    assert report.tokens_seen == 50
    assert report.tokens_stored == (11 if row is LOSSY[0] and not case.sliding else 16 if row is LOSSY[0] else 50)
    assert row.name.startswith(report.method)
    assert report.plan == cache.plan
    assert {"attend_blocks", "fill_pages"} <= report.backends.keys()
    model(case.prompt(1, rows=3), past_key_values=cache)
    assert lc.report(model).tokens_seen == 51
    assert lc.report(model).kv_bytes == live(cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streaming_holds_sinks_and_window_only(dtype: torch.dtype) -> None:
    model = lc.patch(LLAMA.make().to(dtype), lc.StreamingLLM(sinks=2, window=9))
    one = bytes_per_token(LLAMA.make().to(dtype))
    for tokens in (5, 11, 60):
        generate(model, {"input_ids": LLAMA.prompt(tokens)}, max_new_tokens=1, min_new_tokens=1)
        assert lc.report(model).kv_bytes == 11 * one  # a page at least, and never more than sinks + window
        assert lc.report(model).dense_kv_bytes == tokens * one


def test_streaming_heads_hold_sinks_and_window_only() -> None:
    """Half of the heads hold 7 of 4,096 tokens."""
    model = lc.patch(LLAMA.make(), LOSSY[1].method(LLAMA))
    with torch.no_grad():
        out = model(LLAMA.prompt(4096))
    report = lc.report(model)
    assert report.kv_bytes == live(out.past_key_values)
    assert report.kv_bytes == pytest.approx((0.5 + 0.5 * 7 / 4096) * report.dense_kv_bytes, rel=0.05)


def test_the_numbers_outlive_the_cache() -> None:
    model = lc.patch(LLAMA.make(), LOSSY[0].method(LLAMA))
    generate(model, batch(LLAMA), return_dict_in_generate=False)
    report = lc.report(model)
    assert not report.live
    assert report.kv_bytes == 2 * 11 * bytes_per_token(LLAMA.make())
    assert (report.tokens_seen, report.tokens_stored) == (51, 11)
    assert "51 seen, 11 stored" in str(report)
    assert "released since" in str(report)
    assert model.generation_config is not None


def test_before_the_first_call_and_after_a_new_plan() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    empty = lc.report(model)
    assert (empty.kv_bytes, empty.dense_kv_bytes, empty.tokens_seen, empty.live) == (0, 0, 0, False)
    out = model(LLAMA.prompt(10))
    assert lc.report(model).tokens_seen == 10
    lc.patch(model, LOSSY[0].method(LLAMA))
    assert lc.report(model).tokens_seen == 0
    assert out.past_key_values.get_seq_length() == 10


def test_an_unpatched_model_has_no_report() -> None:
    with pytest.raises(ValueError, match="report: expected a patched model"):
        lc.report(LLAMA.make())


@pytest.mark.parametrize(("row", "case"), pairs((LIMITS[0], *LOSSY), SOME), ids=named)
def test_text_of_a_report_names_plan_and_backends(row: Row, case: Case) -> None:
    model = lc.patch(case.make(), row.method(case))
    generate(model, batch(case))
    text = str(lc.report(model))
    assert text.startswith(lc.report(model).plan.describe())
    assert "KV cache: " in text
    assert "fill_pages: " in text
    assert lc.Plan.from_json(lc.report(model).plan.to_json()) == lc.report(model).plan


# what does not fit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["forward", "generate"])
def test_a_context_larger_than_memory_is_refused_before_anything_runs(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []
    model = lc.patch(LLAMA.make(), "dense")
    model.model.layers[0].register_forward_pre_hook(lambda *_: ran.append(1))
    need = 2000 * bytes_per_token(LLAMA.make())
    ids = LLAMA.prompt(2000)
    monkeypatch.setattr(memory, "available_bytes", lambda device: need - 1)
    with pytest.raises(MemoryError, match=r"of 2000 tokens under plan 'dense' on cpu.*patch with 'streaming_llm'"):
        model(ids) if way == "forward" else model.generate(ids, max_new_tokens=1)
    assert ran == []
    lc.patch(model, "streaming_llm")
    ran.clear()  # to patch it was to look how the layers rotate
    model(ids)
    assert ran == [1]
    monkeypatch.setattr(memory, "available_bytes", lambda device: need)
    lc.patch(model, "dense")
    assert model(ids).past_key_values.kv_bytes >= need
    assert ran == [1, 1]


def test_the_suggested_window_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1500 * bytes_per_token(LLAMA.make())
    monkeypatch.setattr(memory, "available_bytes", lambda device: free)
    model, ids = lc.patch(LLAMA.make(), "dense"), LLAMA.prompt(2000)
    with pytest.raises(MemoryError, match="a window below 1500 tokens"):
        model(ids)
    lc.patch(model, lc.StreamingLLM(sinks=4, window=1495))
    assert model(ids).past_key_values.kv_bytes <= free


def test_what_a_filled_cache_holds_already_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = lc.patch(LLAMA.make(), "dense"), LLAMA.prompt(3000)
    with torch.no_grad():
        cache = model(ids[:, :1500]).past_key_values
        monkeypatch.setattr(memory, "available_bytes", lambda device: 1500 * bytes_per_token(LLAMA.make()))
        assert model(ids[:, 1500:], past_key_values=cache).past_key_values.get_seq_length() == 3000
        with pytest.raises(MemoryError):
            model(ids, past_key_values=cache)
        assert cache.get_seq_length() == 3000
        model(ids[:, :1], past_key_values=cache)


def test_a_cache_that_was_reset_has_read_nothing() -> None:
    model = lc.patch(LLAMA.make(), lc.XAttention(stride=4, tau=0.2, block=8, dense_below=0))
    cache = model(LLAMA.prompt(50)).past_key_values
    assert 0 < lc.report(model).density < 1
    cache.reset()
    assert lc.report(model).density is None


CHOOSING = [row for row in SELECTING if row.name != "inf_llm"] + [
    Row("per_query_head", lambda case: lc.Quest(8, page=4, sink=0, dense_layers=0, share="q_head")),
    Row("inf_llm", lambda case: lc.InfLLM(init=4, local=6, block=4, topk=1, representatives=2, q_block=8)),
]


@pytest.mark.parametrize("row", CHOOSING, ids=named)
@torch.no_grad()
def test_density_is_what_was_read_of_what_each_query_could_see(row: Row) -> None:
    """Counted block by block from what the layers were told to read, in a padded batch, kept choices included."""
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    read: dict[bool, int] = {True: 0, False: 0}
    seen = dict(read)

    def watch(layer: int, group: lc.HeadGroup, selector: lc.Selector, q_pos: torch.Tensor, found: Selection) -> None:
        few = q_pos.shape[1] == 1
        last = q_pos.view(q_pos.shape[0], -1, found.q_block).amax(-1).expand(2, -1)
        there = found.ids <= (last // selector.block)[:, None, :, None]  # a choice has blocks for tokens to come
        read[few] += int(((found.ids >= 0) & there).sum())
        seen[few] += found.ids.shape[1] * sum(end // selector.block + 1 for end in last.flatten().tolist() if end >= 0)

    state = state_of(model)
    assert state is not None
    state.watch = watch
    ids, mask = LLAMA.prompt(40, rows=2), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :7] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    for _ in range(7):
        mask = torch.cat((mask, mask[:, -1:]), 1)
        model(LLAMA.prompt(1, rows=2), attention_mask=mask, past_key_values=cache)
    found = {few: cache.ledger.density(phase) for few, phase in ((True, "decode"), (False, "prefill"))}
    assert found == {few: read[few] / seen[few] if seen[few] else None for few in (True, False)}
    assert lc.report(model).density == sum(read.values()) / sum(seen.values())


@torch.no_grad()
def test_blocks_in_host_memory_are_told_as_the_stores_count_them() -> None:
    model = lc.patch(LLAMA.make(), lc.Quest(12, page=4, dense_layers=0), placement=lc.HostLRU(resident_blocks=3))
    before = lc.report(model)
    assert (before.hits, before.misses, before.hit_rate) == (0, 0, None)
    assert "\noffloaded: 0 blocks read, 0 hits, 0 misses; 0.0 MiB on the device (0.0 of" in str(before)
    cache = model(LLAMA.prompt(1500)).past_key_values
    for token in LLAMA.prompt(30)[0]:
        model(token.view(1, 1), past_key_values=cache)
    report = lc.report(model)
    stores = [store for layer in cache.layers for _, store in layer.stores]
    assert [report.hits, report.misses] == sum(s.pool.counts for s in stores).tolist()
    assert report.hits > 0
    assert report.misses > 0
    assert report.hits + report.misses <= 30 * LLAMA.layers * LLAMA.kv_heads * 2  # what is forced is not counted
    assert report.hit_rate == report.hits / (report.hits + report.misses)
    assert report.index_bytes == sum(s.index.nbytes for s in stores) > 0
    sizes = (cache.kv_bytes, report.index_bytes, sum(s.host_bytes for s in stores))
    device, index, host = (x / 2**20 for x in sizes)
    assert report.host_bytes == sum(s.host_bytes for s in stores)
    assert (
        f"\noffloaded: {report.hits + report.misses} blocks read, {report.hits} hits, {report.misses} misses "
        f"({report.hit_rate:.1%} hits); {device:.1f} MiB on the device ({index:.1f} of them the index), "
        f"{host:.1f} MiB on the host\n"
    ) in str(report)
    del cache, stores
    assert (lc.report(model).hits, lc.report(model).live) == (report.hits, False)
    assert asdict(report)["hit_rate"] == report.hit_rate


@torch.no_grad()
def test_a_reset_cache_has_no_hits_and_a_plan_on_the_device_no_such_line() -> None:
    model = lc.patch(LLAMA.make(), lc.Quest(12, page=4, dense_layers=0), placement=lc.HostLRU(resident_blocks=3))
    cache = model(LLAMA.prompt(100)).past_key_values
    model(LLAMA.prompt(1), past_key_values=cache)
    assert lc.report(model).misses > 0
    cache.reset()
    assert (lc.report(model).hits, lc.report(model).misses, lc.report(model).hit_rate) == (0, 0, None)
    assert "offloaded" not in str(lc.report(lc.patch(model, "quest")))
