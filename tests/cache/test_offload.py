"""A store whose blocks lie in host memory shows what lists show, and what a store on the device would."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_longctx as lc
from hf_longctx.cache import host
from hf_longctx.cache.kv_format import Int4KV, Int8KV
from hf_longctx.cache.placement import HostLRU
from hf_longctx.cache.rows import decoded
from hf_longctx.cache.step import Step
from hf_longctx.kernels.types import parts
from hf_longctx.plan import Selector
from hf_longctx.select.budgets import TopK
from hf_longctx.select.scorers import RepresentativeDot, UpperBound
from hf_longctx.select.summaries import MinMax, Representatives

from .vectors import HEADS, Text, assert_reads, change, reals

FORMATS = st.sampled_from([None, Int8KV(), Int4KV()])


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SEGMENT", 24)


def policy(
    block: int, sink: int, local: int, picked: int, kv: Any, placement: Any, q_block: int | None = None
) -> lc.HeadPolicy:
    """Bounds of keys, or representatives if there is a `q_block`."""
    knobs = {"budget": TopK(picked * block), "sink": sink, "local": local}
    if q_block is None:
        selector = Selector(UpperBound(MinMax(block, 1)), **knobs)
        return lc.HeadPolicy(lc.KeepAll(), lc.Absolute(), decode=selector, kv=kv, placement=placement)
    selector = Selector(RepresentativeDot(Representatives(block, 1), q_block), **knobs)
    return lc.HeadPolicy(lc.KeepAll(), lc.Absolute(), selector, selector, kv=kv, placement=placement)


def ends(text: Text) -> torch.Tensor:
    """Tokens of each row."""
    return torch.tensor([len(keys) for keys in text.keys])


def whole(text: Text) -> Any:
    """All keys and values of a store."""
    return text.store.whole(ends(text), text.cache.ledger.columns)


def locate(text: Text, ids: torch.Tensor, block: int) -> torch.Tensor:
    """Where a step after the text would find blocks."""
    columns, lengths = text.cache.ledger.columns, ends(text)
    step = Step(columns, 0, torch.device("cpu"), lengths, None, ragged=bool((lengths != columns).any()))
    found: torch.Tensor = text.store.locate(ids, block, step)
    return found


def assert_located(text: Text, data: st.DataObject, block: int, picked: int) -> None:
    """Blocks that a step may read are found where the store says, whichever these are."""
    store, rows = text.store, len(text.keys)
    heads = data.draw(st.sampled_from([1, HEADS]))
    chosen = []
    for end in (end for end in ends(text).tolist() for _ in range(heads)):
        last = (end - 1) // block
        near = set(range(max(0, last - store.pages.tail + 1), last + 1)) | set(range(min(store.pages.sinks, last + 1)))
        far = [j for j in range(last + 1) if j not in near]
        some = data.draw(st.lists(st.sampled_from(far), max_size=picked, unique=True)) if far else []
        chosen.append(sorted([*some, *near]))
    width = max(map(len, chosen)) + 1
    ids = torch.tensor([ids + [-1] * (width - len(ids)) for ids in chosen], dtype=torch.int32)
    ids = ids.view(rows, heads, 1, width)
    pages = locate(text, ids, block)
    assert pages.shape == (rows, HEADS, 1, width)
    assert pages.dtype == torch.int32
    places = ids.expand_as(pages)
    assert bool(((pages < 0) == (places < 0)).all())
    for stored, lists in zip(map(decoded, store.memory), (text.keys, text.values), strict=True):
        for row, head, _, place in (places >= 0).nonzero().tolist():
            first, page = int(places[row, head, 0, place]) * block, int(pages[row, head, 0, place]) * block
            expected = torch.stack([x[head] for x in lists[row][first : first + block]])
            assert torch.equal(stored[row, head, page : page + len(expected)], expected)


def assert_whole(text: Text) -> None:
    for stored, lists in zip(map(decoded, whole(text)), (text.keys, text.values), strict=True):
        assert bool(stored.isfinite().all())
        for row, tokens in enumerate(lists):
            if tokens:
                assert torch.equal(stored[row, :, : len(tokens)], torch.stack(tokens, 1))


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@settings(max_examples=60)
@given(
    data=st.data(),
    kv=FORMATS,
    block=st.sampled_from([1, 2, 5]),
    sink=st.integers(0, 4),
    local=st.integers(1, 9),
    resident=st.integers(0, 6),
)
def test_every_token_is_found_again(
    padded: bool, data: st.DataObject, kv: Any, block: int, sink: int, local: int, resident: int
) -> None:
    given_policy = policy(block, sink, local, 2, kv, HostLRU(resident))
    text = Text(given_policy, rows=data.draw(st.integers(1, 3)))
    for _ in range(data.draw(st.integers(1, 7))):
        step, k, v = text.draw(data.draw(reals(len(text.keys), padded, 90)))
        if data.draw(st.booleans()):
            assert_reads(text, text.store.append(k, v, step), step)
        else:
            text.store.write(k, v, step)
        text.cache.commit(step)
        for _ in range(2):
            assert_located(text, data, block, 2)
        assert_whole(text)
        entries = text.store.summaries  # of one key each: the keys
        for row, keys in enumerate(text.keys):
            for place, key in enumerate(keys):
                assert torch.equal(entries[row, :, place, 0], key)
        change(text, data)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@settings(max_examples=30)
@given(data=st.data(), kv=FORMATS, shape=st.sampled_from([(2, 1, 5, 7), (4, 0, 1, 3), (3, 4, 20, 40)]))
def test_representatives_are_those_of_a_store_on_the_device(
    padded: bool, data: st.DataObject, kv: Any, shape: tuple[int, int, int, int]
) -> None:
    block, sink, local, q_block = shape
    texts = [Text(policy(block, sink, local, 2, kv, p, q_block), rows=2) for p in (None, HostLRU(0))]
    for _ in range(data.draw(st.integers(1, 10))):
        real = data.draw(reals(len(texts[0].keys), padded, q_block))
        for text in texts:
            step, k, v = text.draw(real)
            text.store.write(k, v, step)
            ids = torch.arange(max(0, step.columns - local) // block, (step.columns + step.tokens - 1) // block + 1)
            mass = torch.rand(len(real), HEADS, 1, len(ids) * block, generator=text.random)
            place = (ids[:, None] * block + torch.arange(block)).flatten()
            near = (place > step.lengths.view(-1, 1, 1, 1) - local) & (place < step.lengths_after.view(-1, 1, 1, 1))
            text.store.add_mass(ids.to(torch.int32).expand(len(real), 1, 1, -1), mass * near, block)
            text.cache.commit(step)
        plain, offloaded = (text.store.summaries for text in texts)
        for row, start in enumerate(step.lengths.expand(len(real)).tolist()):
            closed = max(0, start - local + 1) // block
            assert torch.equal(plain[row, :, :closed], offloaded[row, :, :closed])
        assert_located(texts[1], data, block, 2)
        picked = data.draw(st.lists(st.integers(0, len(real) - 1), min_size=1, max_size=3))
        for text in texts:
            text.pick(picked)


def fill(text: Text, calls: list[int]) -> None:
    for tokens in calls:
        step, k, v = text.draw(torch.ones(len(text.keys), tokens, dtype=torch.bool))
        text.store.write(k, v, step)
        text.cache.commit(step)


def test_the_device_holds_no_more_however_long_the_text() -> None:
    text = Text(policy(4, 4, 8, 2, None, HostLRU(3)), rows=2)
    fill(text, [90])
    index = text.store.summaries.shape[2]
    assert index == 90
    live = sum(x.untyped_storage().nbytes() for stored in text.store.memory for x in parts(stored))
    blocks = 1 + 9 + 3  # sinks; 8 local, twice 8 of a call, 3 more; pool
    assert live == 2 * 2 * HEADS * blocks * 4 * 4 * 4
    assert text.store.kv_bytes == live + text.store.index.nbytes
    assert text.store.host_bytes == 2 * 2 * HEADS * 96 * 4 * 4
    fill(text, [300, 1, 1])
    assert text.store.kv_bytes == live + text.store.index.nbytes
    assert text.store.host_bytes == 2 * 2 * HEADS * 408 * 4 * 4 == text.cache.host_bytes == text.cache.ledger.host_bytes


def test_the_host_has_nothing_of_a_text_that_fits_on_the_device() -> None:
    text = Text(policy(4, 4, 8, 2, None, HostLRU(3)), rows=2)
    fill(text, [30, 9, 1])
    assert text.store.pages.most == 40
    assert (text.store.host_bytes, text.store.pool) == (0, None)
    text.crop(6)
    text.pick([1, 0, 0])
    fill(text, [6])
    assert_whole(text)
    assert (text.store.host_bytes, text.store.pool) == (0, None)
    fill(text, [1])
    assert text.store.host_bytes == 2 * 3 * HEADS * 48 * 4 * 4
    fill(text, [50])
    assert_whole(text)


def test_blocks_come_from_the_host_once_while_they_fit() -> None:
    text = Text(policy(4, 4, 8, 2, None, HostLRU(2)), rows=1)
    fill(text, [100])
    ids = torch.tensor([[[[0, 3, 5, 24]]]], dtype=torch.int32)
    for _ in range(3):
        locate(text, ids, 4)
    assert text.store.pool.counts.tolist() == [2 * 2 * HEADS, 2 * HEADS]
    locate(text, torch.tensor([[[[5, 6]]]], dtype=torch.int32), 4)
    assert text.store.pool.counts.tolist() == [5 * HEADS, 3 * HEADS]


def test_a_block_that_was_taken_back_is_not_read_from_the_pool() -> None:
    text = Text(policy(4, 0, 1, 2, None, HostLRU(2)), rows=1)
    fill(text, [100])
    ids = torch.tensor([[[[5, 6]]]], dtype=torch.int32)
    locate(text, ids, 4)
    text.crop(78)
    fill(text, [78])
    for stored, lists in zip(text.store.memory, (text.keys, text.values), strict=True):
        for page, block in zip(locate(text, ids, 4)[0, 0, 0].tolist(), (5, 6), strict=True):
            expected = torch.stack(lists[0][block * 4 : block * 4 + 4], 1)
            assert torch.equal(stored[0, 0, page * 4 : page * 4 + 4], expected[0])


def test_more_blocks_than_fit_are_our_own_mistake() -> None:
    text = Text(policy(4, 0, 8, 2, None, HostLRU(0)), rows=1)
    fill(text, [100])
    with pytest.raises(AssertionError, match="more blocks at once"):
        locate(text, torch.arange(8, dtype=torch.int32).view(1, 1, 1, 8), 4)


def test_files_hold_the_same_and_go_away(tmp_path: Path) -> None:
    texts = [Text(policy(4, 4, 8, 2, Int8KV(), HostLRU(2, disk=d)), rows=2) for d in (None, str(tmp_path))]
    for text in texts:
        fill(text, [100, 1])
        text.pick([1, 0])
        fill(text, [7])
        assert_whole(text)
    assert texts[0].store.host_bytes == texts[1].store.host_bytes > 0
    assert not list(tmp_path.iterdir())  # they have no name
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert str(tmp_path) in mapped.read_text()
        del texts, text
        gc.collect()
        assert str(tmp_path) not in mapped.read_text()


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "file"])
def test_a_copy_goes_its_own_way(on_disk: bool, tmp_path: Path) -> None:
    text = Text(policy(4, 4, 8, 2, Int4KV(), HostLRU(2, disk=str(tmp_path) if on_disk else None)), rows=2)
    fill(text, [100])
    keys, values, reals_so_far = [list(x) for x in text.keys], [list(x) for x in text.values], list(text.reals)
    twin = copy.deepcopy(text.cache)
    fill(text, [60])
    assert_whole(text)
    text.cache, text.keys, text.values, text.reals = twin, keys, values, reals_so_far
    fill(text, [61])
    assert_whole(text)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected disk as a folder that exists; got .*nowhere'\. Make it"):
        Text(policy(4, 4, 8, 2, None, HostLRU(2, disk=str(tmp_path / "nowhere"))), rows=1)
