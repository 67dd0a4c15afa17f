"""CUDA graphs of decode steps: the same tokens as without, no wait for the device, and nothing left behind."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import hf_longctx as lc
from hf_longctx import graph, recording

from ..methods.cases import LIMITS, LOSSY, Row, named
from .cases import BY_NAME
from .test_generate import batch, generate, single
from .test_graph import FILES, INF_LLM, LSERVE, PLACED, QUEST, assert_same
from .tiny import Case

pytestmark = [pytest.mark.cuda]

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

LLAMA = BY_NAME["llama"]
NAMES = ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt_oss", "gpt_neox", "falcon_new", "smollm3", "opt")
ROWS = (LIMITS[0], *LOSSY, QUEST, LSERVE, INF_LLM, *PLACED[3:5])
PAIRS = [(row, BY_NAME[name]) for row in ROWS for name in NAMES if row.takes(BY_NAME[name])]


def moved(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same on the GPU."""
    return {name: x.cuda() for name, x in inputs.items()}


def both(row: Row, case: Case, inputs: dict[str, torch.Tensor], **options: Any) -> tuple[Any, Any, Any]:
    """What `generate` gives with graphs and without, and the model with graphs."""
    with_graphs, without = (lc.patch(case.make().cuda(), row.method(case), cuda_graph=on) for on in (True, False))
    options = {"output_logits": True, **options}
    return *(generate(model, moved(inputs), **options) for model in (with_graphs, without)), with_graphs


@contextmanager
def no_wait() -> Iterator[None]:
    """Any wait for the device is an error inside."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("row", [LIMITS[0], *LOSSY, QUEST, LSERVE], ids=named)
def test_the_same_tokens_with_a_zero_sink(row: Row) -> None:
    models = (lc.patch(LLAMA.make().cuda(), row.method(LLAMA), zero_sink=True, cuda_graph=on) for on in (True, False))
    recorded, plain = (generate(model, moved(batch(LLAMA)), output_logits=True, max_new_tokens=40) for model in models)
    assert_same(recorded, plain)


@pytest.mark.parametrize(("row", "case"), PAIRS, ids=named)
def test_the_same_tokens(row: Row, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "ROOM", 16)  # so that a few steps run into the end of it
    recorded, plain, model = both(row, case, batch(case), max_new_tokens=40)
    assert_same(recorded, plain)
    report = lc.report(model)
    assert report.eager is None
    assert report.graphs > 0


@pytest.mark.parametrize("row", ROWS, ids=named)
@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3}, {"use_cache": True}], ids=str)
def test_ways_to_generate(row: Row, options: dict[str, Any]) -> None:
    recorded, plain, model = both(row, LLAMA, single(LLAMA), max_new_tokens=40, **options)
    assert_same(recorded, plain)
    assert lc.report(model).graphs > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("row", ROWS, ids=named)
def test_half_precision_on_the_compiled_path(row: Row, dtype: torch.dtype) -> None:
    """Heads of 64 channels, which the compiled kernels take; two runs with graphs are equal to the bit."""
    case = BY_NAME["llama_wide_heads"]
    model = case.build()
    model.config.head_dim = 64
    torch.manual_seed(0)
    model = type(model)(model.config).eval().cuda().to(dtype)
    lc.patch(model, row.method(case))
    first, second = (generate(model, moved(batch(case)), output_logits=True, max_new_tokens=40) for _ in range(2))
    assert lc.report(model).graphs > 0
    assert all(torch.equal(a, b) for a, b in zip(first.logits, second.logits, strict=True))
    lc.patch(model, row.method(case), cuda_graph=False)
    plain = generate(model, moved(batch(case)), output_logits=True, max_new_tokens=40)
    scale = float(plain.logits[1].float().abs().max())
    torch.testing.assert_close(first.logits[1].float(), plain.logits[1].float(), rtol=0.05, atol=0.05 * scale)


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_a_replay_does_not_wait(row: Row) -> None:
    model, ids = lc.patch(LLAMA.make().cuda(), row.method(LLAMA)), LLAMA.prompt(72, rows=2).cuda()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        # so many that the host has blocks from the start
        cache = model(ids[:, :42], attention_mask=mask[:, :42], position_ids=places[:, :42]).past_key_values
        for i in range(42, 72):
            call = {"attention_mask": mask[:, : i + 1], "position_ids": places[:, i : i + 1], "past_key_values": cache}
            if i < 52:
                model(ids[:, i : i + 1], **call)
                continue
            with no_wait():
                model(ids[:, i : i + 1], **call)
    assert lc.report(model).graphs > 0


def test_memory_goes_with_the_cache() -> None:
    model = lc.patch(LLAMA.make().cuda(), "dense")
    generate(model, moved(single(LLAMA)))
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = generate(model, moved(single(LLAMA)), max_new_tokens=30)
    report = lc.report(model)
    assert report.graphs == 1
    assert report.graph_bytes > 0
    del out, report
    gc.collect()
    assert lc.report(model).graphs == 0
    assert torch.cuda.memory_allocated() <= before


def test_what_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait for the device in the model's own code ends the recording; the tokens are the same."""
    model = LLAMA.make().cuda()
    expected = generate(lc.patch(model, "dense", cuda_graph=False), moved(batch(LLAMA))).sequences
    layer = type(model.model.layers[0])
    forward = layer.forward

    def waits(self: Any, x: torch.Tensor, **kwargs: Any) -> Any:
        return forward(self, x, **kwargs) if float(x.sum()) < torch.inf else x

    monkeypatch.setattr(layer, "forward", waits)
    lc.patch(model, "dense")
    assert torch.equal(generate(model, moved(batch(LLAMA))).sequences, expected)
    assert "could not be recorded" in (lc.report(model).eager or "")
    monkeypatch.undo()
    lc.patch(model, "dense")
    out = generate(model, moved(batch(LLAMA)))  # graphs live as long as the cache
    assert torch.equal(out.sequences, expected)
    assert lc.report(model).graphs > 0


def test_files_are_not_recorded() -> None:
    model = lc.patch(LLAMA.make().cuda(), FILES.method(LLAMA))
    generate(model, moved(single(LLAMA)))
    assert "blocks lie in files" in (lc.report(model).eager or "")


@torch.no_grad()
def test_a_copy_of_a_cache_has_host_memory_of_its_own() -> None:
    """Both are read and written by the device, and go on to other texts."""
    model, ids = lc.patch(LLAMA.make().cuda(), INF_LLM.method(LLAMA)), LLAMA.prompt(110, rows=2).cuda()
    cache = model(ids[:, :60], use_cache=True).past_key_values
    assert cache.host_bytes > 0
    twin, out = copy.deepcopy(cache), []
    for i in range(60, 110):
        out.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
        model(ids[:, i - 60 : i - 59], past_key_values=twin)
    again = model(ids[:, :60], use_cache=True).past_key_values
    for i, expected in enumerate(out):
        assert torch.equal(model(ids[:, 60 + i : 61 + i], past_key_values=again).logits, expected)


def test_memory_that_moves_is_recorded_again() -> None:
    """Rows that are repeated and picked move the cache; what was recorded before must not be replayed on it."""
    model, ids = lc.patch(LLAMA.make().cuda(), "quest", token_budget=16, page=4), LLAMA.prompt(60).cuda()
    other = lc.patch(LLAMA.make().cuda(), "quest", token_budget=16, page=4, cuda_graph=False)
    with torch.no_grad():
        caches = [m(ids[:, :30], use_cache=True).past_key_values for m in (model, other)]
        for i in range(30, 60):
            if i == 40:
                [cache.batch_repeat_interleave(3) for cache in caches]
            if i == 50:
                [cache.batch_select_indices(torch.tensor([2, 0], device="cuda")) for cache in caches]
            rows = caches[0].ledger.rows
            step = ids[:, i : i + 1].expand(rows, -1)
            a, b = (m(step, past_key_values=c).logits for m, c in zip((model, other), caches, strict=True))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))
    assert graph.CudaGraph in {type(g) for g in model.get_decoder().forward.graphs(caches[0])}
