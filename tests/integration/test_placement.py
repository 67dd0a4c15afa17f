"""Blocks in host memory: bit for bit what the same blocks give on the device, and no wait for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import hf_longctx as lc
from hf_longctx.cache import host
from hf_longctx.methods import compose
from hf_longctx.models import inspect_model

from .cases import BY_NAME
from .tiny import Case

LLAMA = BY_NAME["llama_wide_heads"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
INF = {"init": 16, "local": 12, "block": 16, "topk": 2, "representatives": 2, "q_block": 20, "resident_blocks": 3}
QUEST = lc.Quest(32, page=16, sink=0, dense_layers=0)
TOKENS = 400
CALLS = [150, 7, *[1] * 30, 40, *[1] * 70, 3, *[1] * 100]


def plans(case: Case, kind: str, kv: str, disk: str | None = None) -> tuple[lc.Plan, lc.Plan]:
    """In host memory, or in files, and on the device."""
    facts = inspect_model(case.build())
    if kind == "inf_llm":
        both = (lc.InfLLM(**INF, kv=kv, disk=disk), lc.InfLLM(**INF, kv=kv, offload=False))
        return both[0].plan(facts), both[1].plan(facts)
    place = lc.HostLRU(resident_blocks=3, disk=disk)
    return compose(facts, decode=QUEST, kv=kv, placement=place), compose(facts, decode=QUEST, kv=kv)


def model_of(case: Case, device: str, dtype: torch.dtype) -> Any:
    return case.make(0).to(device=device, dtype=dtype)


@torch.no_grad()
def told(model: Any, ids: torch.Tensor, mask: torch.Tensor | None, crop: int) -> tuple[torch.Tensor, Any]:
    """Logits of a text that comes in calls, and the cache; rows change places on the way, and tokens are taken back."""
    out, cache, start = [], None, 0
    for number, tokens in enumerate(CALLS):
        stop = start + tokens
        seen = None if mask is None else mask[:, :stop]
        result = model(ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True)
        out.append(result.logits)
        cache, start = result.past_key_values, stop
        if number in (20, 60) and mask is None:
            cache.reorder_cache(torch.tensor([1, 1, 0], device=ids.device))
        if crop and number in (1, 40, 140):
            cache.crop(-crop)
            start -= crop
    return torch.cat(out, 1), cache


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SEGMENT", 128)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("kv", ["native", "int8", "int4"])
@pytest.mark.parametrize("kind", ["inf_llm", "quest"])
def test_the_same_bits(kind: str, kv: str, padded: bool, device: str) -> None:
    ids = LLAMA.prompt(TOKENS, rows=3).to(device)
    mask = torch.ones_like(ids)
    mask[0, :37] = mask[1, 100:110] = 0
    crop = 0 if kind == "inf_llm" else 60 if not padded else 3
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    both = []
    for plan in plans(LLAMA, kind, kv):
        model = lc.patch(model_of(LLAMA, device, dtype), plan)
        logits, cache = told(model, ids, mask if padded else None, crop)
        both.append(logits)
        if cache.offloaded:
            report = lc.report(model)
            assert min(report.hits, report.misses, report.host_bytes) > 0
    assert torch.equal(*both)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["inf_llm", "quest"])
def test_the_same_bits_from_files(kind: str, device: str, tmp_path: Path) -> None:
    ids = LLAMA.prompt(TOKENS, rows=3).to(device)
    there, here = (
        told(lc.patch(model_of(LLAMA, device, torch.float32), plan, cuda_graph=False), ids, None, 0)[0]
        for plan in plans(LLAMA, kind, "native", str(tmp_path))
    )
    assert torch.equal(there, here)


@pytest.mark.cuda
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "recorded"])
@pytest.mark.parametrize("kind", ["inf_llm", "quest"])
@torch.no_grad()
def test_a_step_does_not_wait(kind: str, graph: bool) -> None:
    """Beyond the step at which host memory grows."""
    model = lc.patch(model_of(LLAMA, "cuda", torch.bfloat16), plans(LLAMA, kind, "native")[0], cuda_graph=graph)
    ids = LLAMA.prompt(TOKENS, rows=2).cuda()
    cache = model(ids[:, :250], use_cache=True).past_key_values
    for i in range(250, 350):
        grows = (i + 1) % 128 == 16  # a block more is full than the segments hold
        torch.cuda.set_sync_debug_mode("default" if i < 256 or grows else "error")
        try:
            model(ids[:, i : i + 1], past_key_values=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert lc.report(model).eager is None
    assert (lc.report(model).graphs > 0) is graph
    assert lc.report(model).misses > 0
