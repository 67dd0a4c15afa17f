"""Whatever happens to a cache, its stores show what a list of tokens per row would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hf_longctx as lc
from hf_longctx.cache.rows import PAGE
from hf_longctx.cache.store import ROLLBACK, Store

from .naive import Rows, append, assert_shows, mask_of

CPU = torch.device("cpu")
RETENTIONS = st.one_of(st.just(lc.KeepAll()), st.builds(lc.SinkWindow, st.integers(0, 4), st.integers(1, 9)))


def cache_of(*retentions: Any) -> lc.LongContextCache:
    """One layer with one KV head, two in the tests' data, per retention."""
    groups = tuple(lc.HeadGroup((i,), lc.HeadPolicy(r, lc.Absolute())) for i, r in enumerate(retentions))
    return lc.LongContextCache(lc.Plan("test", (lc.LayerPlan(groups),)))


class Driver:
    """A cache and the rows that it should hold."""

    def __init__(self, cache: lc.LongContextCache) -> None:
        self.cache, self.rows, self.reals = cache, Rows(), list[Tensor]()

    def call(self, real: Tensor) -> None:
        """One call; every store must show every query what it sees."""
        self.reals.append(real)
        padded = not all(bool(r.all()) for r in self.reals)
        step = self.cache.begin(real.shape[1], real.shape[0], CPU, mask_of(self.reals) if padded else None)
        tokens = self.rows.extend(real)
        for group, store in self.cache.stacks[0].stores:
            assert_shows(append(store, tokens, step), self.rows, step, group.policy.retention)
        self.cache.commit(step)

    def crop(self, count: int) -> None:
        self.cache.crop(-count)
        self.rows.tokens = [tokens[: len(tokens) - count] for tokens in self.rows.tokens]
        whole = torch.cat(self.reals, 1)
        self.reals = [whole[:, : whole.shape[1] - count]]

    def pick(self, rows: list[int]) -> None:
        self.rows.tokens = [list(self.rows.tokens[row]) for row in rows]
        self.reals = [real[rows] for real in self.reals]

    def solid(self) -> int:
        """Columns since the last padding in any row."""
        whole = torch.cat(self.reals, 1).all(0).tolist()
        return whole[::-1].index(False) if False in whole else len(whole)


@st.composite
def reals(draw: st.DrawFn, rows: int, padded: bool) -> Tensor:
    """`[rows, T]`: which columns of a call are real; holes anywhere if `padded`."""
    tokens = draw(st.sampled_from([1, 1, 2, 3, 7, 19]))
    if not padded:
        return torch.ones(rows, tokens, dtype=torch.bool)
    flags = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    return torch.tensor([draw(flags) for _ in range(rows)])


def after(driver: Driver, data: st.DataObject, padded: bool) -> None:
    """One thing that may happen to a cache between calls."""
    cache, rows = driver.cache, len(driver.rows.tokens)
    kind = data.draw(st.sampled_from(["nothing", "nothing", "reorder", "select", "flags", "repeat", "crop", "reset"]))
    if kind == "reorder":
        picked = data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows))
        cache.reorder_cache(torch.tensor(picked))
        driver.pick(picked)
    elif kind == "select":
        picked = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4))
        cache.batch_select_indices(torch.tensor(picked))
        driver.pick(picked)
    elif kind == "flags":
        flags = [True, *data.draw(st.lists(st.booleans(), min_size=rows - 1, max_size=rows - 1))]
        cache.batch_select_indices(torch.tensor(flags))
        driver.pick([row for row, flag in enumerate(flags) if flag])
    elif kind == "repeat" and rows < 3:
        cache.batch_repeat_interleave(2)
        driver.pick([row for row in range(rows) for _ in range(2)])
    elif kind == "crop" and not padded:
        count = data.draw(st.integers(0, min(20, sum(real.shape[1] for real in driver.reals))))
        driver.crop(count)
    elif kind == "reset":
        cache.reset()
        assert (cache.kv_bytes, cache.get_seq_length(), cache.batch_size) == (0, 0, -1)
        driver.rows, driver.reals = Rows(), []


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@settings(max_examples=60)
@given(st.data(), st.lists(RETENTIONS, min_size=1, max_size=3, unique=True))
def test_stores_show_what_a_list_of_tokens_would(padded: bool, data: st.DataObject, retentions: list[Any]) -> None:
    driver = Driver(cache_of(*retentions))
    driver.cache.activate_past_recording()
    rows = data.draw(st.integers(1, 3))
    for _ in range(data.draw(st.integers(1, 7))):
        driver.call(data.draw(reals(len(driver.rows.tokens) or rows, padded)))
        after(driver, data, padded)
        rows = len(driver.rows.tokens) or rows
    driver.call(torch.ones(rows, 1, dtype=torch.bool))
    driver.call(torch.ones(rows, 5, dtype=torch.bool))


def needs_what_is_lost(length: int, longest: int, retention: Any, record: bool) -> bool:
    """True if the token after `length` others sees one that was overwritten when there were `longest`."""
    if retention.window is None:
        return False
    lost = set(range(retention.sink, longest - retention.window - (ROLLBACK if record else 0)))
    return bool(lost & set(range(max(0, length - retention.window + 1), length)))


@settings(max_examples=60)
@given(st.data(), RETENTIONS, st.booleans())
def test_crop_gives_back_the_tokens_or_says_that_it_cannot(data: st.DataObject, retention: Any, record: bool) -> None:
    driver = Driver(cache_of(retention))
    if record:
        driver.cache.activate_past_recording()
    longest = 0
    for _ in range(data.draw(st.integers(1, 5))):
        driver.call(data.draw(reals(1, padded=False)))
        length = driver.cache.get_seq_length()
        longest = max(longest, length)
        count = data.draw(st.integers(0, max(0, length - retention.sink - (retention.window or 0))))
        if needs_what_is_lost(length - count, longest, retention, record):
            with pytest.raises(ValueError, match=f"left the window of {retention.window} for good"):
                driver.cache.crop(-count)
        else:
            driver.crop(count)
            assert driver.cache.get_seq_length() == length - count
    driver.call(torch.ones(1, 1, dtype=torch.bool))
    driver.call(torch.ones(1, 4, dtype=torch.bool))


@settings(max_examples=60)
@given(st.data(), RETENTIONS)
def test_crop_stops_at_padding(data: st.DataObject, retention: Any) -> None:
    driver = Driver(cache_of(retention))
    driver.cache.activate_past_recording()
    for _ in range(data.draw(st.integers(1, 4))):
        driver.call(data.draw(reals(2, padded=True)))
    driver.call(torch.ones(2, data.draw(st.integers(1, 4)), dtype=torch.bool))
    total, solid = driver.cache.get_seq_length(), driver.solid()
    if solid < total:
        with pytest.raises(ValueError, match=f"expected at most {solid} tokens"):
            driver.cache.crop(-(solid + 1))
    driver.crop(data.draw(st.integers(0, solid)))
    driver.call(torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("record", [False, True])
def test_a_window_holds_no_more_than_it_may(record: bool) -> None:
    store = Store(lc.HeadPolicy(lc.SinkWindow(4, 9), lc.Absolute()))
    cache = lc.LongContextCache(cache_of(lc.SinkWindow(4, 9)).plan)
    cache.stacks[0].stores = [(cache.plan.layers[0].groups[0], store)]
    if record:
        store.record()
    driver = Driver(cache)
    for tokens in (3, 1, 300, 1, 1, 40):
        driver.call(torch.ones(2, tokens, dtype=torch.bool))
        assert store.k is not None
        assert store.k.shape[2] <= 4 + 9 + (ROLLBACK if record else 0)
        assert store.limit == 4 + 9 + (ROLLBACK if record else 0)


def test_growth_is_by_pages_and_by_a_few_percent() -> None:
    driver = Driver(cache_of(lc.KeepAll()))
    store = driver.cache.stacks[0].stores[0][1]
    moved, held = 0, 0
    for _ in range(250):
        driver.call(torch.ones(1, 1, dtype=torch.bool))
        assert store.k is not None
        if store.k.shape[2] != held:
            moved, held = moved + 1, store.k.shape[2]
        assert held % PAGE == 0
        assert held <= driver.cache.get_seq_length() * 1.04 + PAGE
    assert moved <= 250 / PAGE + 1


def test_tensors_that_a_store_gave_out_are_not_of_the_graph() -> None:
    store = Store(lc.HeadPolicy(lc.KeepAll(), lc.Absolute()))
    cache = cache_of(lc.KeepAll())
    step = cache.begin(3, 1, CPU, None)
    k = torch.randn(1, 2, 3, 4, requires_grad=True)
    view = store.append(k, k, step)
    assert view.k.requires_grad  # this call's own tokens
    assert store.k is not None
    assert not store.k.requires_grad
