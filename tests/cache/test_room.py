"""What a plan is said to hold is what its tensors hold; what may not or cannot be held is refused beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_longctx as lc
from hf_longctx import memory
from hf_longctx.cache.host import SEGMENT
from hf_longctx.cache.kv_format import Int4KV, Int8KV
from hf_longctx.cache.placement import HostLRU
from hf_longctx.cache.rows import GROWTH, PAGE
from hf_longctx.kernels.types import parts
from hf_longctx.models import inspect_model
from hf_longctx.plan import Selector
from hf_longctx.select.budgets import TopK
from hf_longctx.select.scorers import RepresentativeDot, UpperBound
from hf_longctx.select.summaries import Means, MinMax, Representatives
from hf_longctx.testing import tiny_llama

FACTS = inspect_model(tiny_llama())
CPU = torch.device("cpu")
BOUNDS = Selector(UpperBound(MinMax(16, 4)), TopK(32), sink=4, local=20)
MARKS = Selector(RepresentativeDot(Representatives(16, 2), 64), TopK(32), sink=4, local=20)
RUNS = Selector(RepresentativeDot(Means(16, 4), 64), TopK(32), sink=4, local=20)
KEEP, HERE = lc.KeepAll(), lc.Absolute()
POLICIES = {
    "dense": lc.HeadPolicy(KEEP, HERE),
    "window": lc.HeadPolicy(lc.SinkWindow(4, 100), HERE),
    "int8": lc.HeadPolicy(KEEP, HERE, kv=Int8KV()),
    "int4": lc.HeadPolicy(KEEP, HERE, kv=Int4KV()),
    "window-int8": lc.HeadPolicy(lc.SinkWindow(4, 100), HERE, kv=Int8KV()),
    "bounds": lc.HeadPolicy(KEEP, HERE, decode=BOUNDS),
    "marks": lc.HeadPolicy(KEEP, HERE, MARKS, MARKS),
    "means": lc.HeadPolicy(KEEP, HERE, RUNS, RUNS),
    "host": lc.HeadPolicy(KEEP, HERE, decode=BOUNDS, placement=HostLRU(4)),
    "host-marks-int4": lc.HeadPolicy(KEEP, HERE, MARKS, MARKS, kv=Int4KV(), placement=HostLRU(4)),
}


def plan_of(policy: lc.HeadPolicy) -> lc.Plan:
    """The policy beside a dense head, in both layers."""
    groups = lc.HeadGroup((1,), policy), lc.HeadGroup((0,), POLICIES["dense"])
    return lc.Plan("test", (lc.LayerPlan(groups),) * 2)


def filled(plan: lc.Plan, rows: int, calls: list[int]) -> lc.LongContextCache:
    cache = lc.LongContextCache(plan)
    for tokens in calls:
        step = cache.begin(tokens, rows, CPU, None)
        for stack in cache.stacks:
            for group, store in stack.stores:
                store.write(*torch.randn(2, rows, len(group.kv_heads), tokens, FACTS.layers[0].head_dim), step)
        cache.commit(step)
    return cache


@pytest.mark.parametrize("kind", POLICIES)
@pytest.mark.parametrize("calls", [[60] * 50, [50, 1, 1]], ids=["long", "short"])
def test_the_bytes_of_a_plan_are_those_of_its_tensors(kind: str, calls: list[int]) -> None:
    plan = plan_of(POLICIES[kind])
    cache = filled(plan, 3, calls)
    said = memory.kv_bytes(FACTS, plan, 3, sum(calls), torch.float32)
    live = 0
    for _, store in (pair for stack in cache.stacks for pair in stack.stores):
        beside = [] if store.index is None else [v for v in vars(store.index).values() if isinstance(v, torch.Tensor)]
        live += sum(x.untyped_storage().nbytes() for x in beside)
        live += sum(x.untyped_storage().nbytes() for stored in store.memory for x in parts(stored))
    assert live == cache.kv_bytes
    page = PAGE * 2 * 3 * 2 * 2 * 2 * 8 * 4  # keys and values, rows, layers, heads, bounds beside, channels, bytes
    assert said <= live <= said * (1 + 1 / GROWTH) + page
    there = memory.needs(FACTS, cache, 3, sum(calls), torch.float32).host.get(None, 0)
    assert there == cache.host_bytes


def test_a_cap_on_host_memory_is_kept_before_anything_changes() -> None:
    token = 2 * 2 * 8 * 4  # layers, keys and values, channels, bytes
    plan = plan_of(lc.HeadPolicy(KEEP, HERE, decode=BOUNDS, placement=HostLRU(4, ram=SEGMENT * token)))
    cache = filled(plan, 1, [SEGMENT - 1])
    memory.check_room(FACTS, plan, cache, 1, 16, torch.float32, CPU)
    with pytest.raises(MemoryError, match=r"HostLRU: expected at most 0\.5 MiB .*; needs 1\.0 MiB for 4112 tokens"):
        memory.check_room(FACTS, plan, cache, 1, 17, torch.float32, CPU)
    assert cache.get_seq_length() == SEGMENT - 1
    assert cache.host_bytes == SEGMENT * token


def test_host_memory_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(POLICIES["host"])
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**20)
    with pytest.raises(MemoryError, match=r"under plan 'test' in host memory; needs 4\.9 GiB more, 1\.0 MiB are there"):
        memory.check_room(FACTS, plan, lc.LongContextCache(plan), 1, 41_000_000, torch.float32, CPU)


def test_files_are_checked_against_the_disk_and_not_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(lc.HeadPolicy(KEEP, HERE, decode=BOUNDS, placement=HostLRU(4, ram=1, disk=str(tmp_path))))
    args: Any = (FACTS, plan, lc.LongContextCache(plan), 1, 5000, torch.float32, CPU)
    memory.check_room(*args)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
    with pytest.raises(MemoryError, match=rf"in {tmp_path}; needs 1\.0 MiB more, .* Give another folder as disk"):
        memory.check_room(*args)


def test_each_device_has_room_for_its_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, devices = plan_of(lc.HeadPolicy(KEEP, HERE)), [torch.device("cuda", i) for i in range(2)]
    facts = replace(FACTS, places=(devices[0], devices[1]))
    need = memory.kv_bytes(facts, plan, 1, 2000, torch.float32) // 2  # of each of two layers
    free = {devices[0]: need, devices[1]: need, CPU: 2**40}
    monkeypatch.setattr(memory, "available_bytes", lambda device: free[device])
    args: Any = (facts, plan, lc.LongContextCache(plan), 1, 2000, torch.float32, devices[0])
    memory.check_room(*args)
    assert memory.available_beside(facts) == 2 * need
    free[devices[1]] -= 1
    with pytest.raises(MemoryError, match="under plan 'test' on cuda:1; needs"):
        memory.check_room(*args)
    assert memory.available_beside(facts) == 2 * need - 2
