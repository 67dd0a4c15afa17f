"""Sixteen fine-tunes of a model of Llama 3 8B's shape that generate in one batch, or are loaded in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from decode_generate import Clock, model_8b

import hf_longctx as lc
from hf_longctx.weights.bitdelta.bits import Matrix
from hf_longctx.weights.bitdelta.format import Base, Delta, to_int8

TENANTS, PROMPT, NEW = 16, 128, 128
"""Fine-tunes; tokens of each prompt; tokens that are generated for each before the next fine-tune is loaded."""

COPIED = 2 << 30
"""Bytes of pinned memory with which loading is timed."""


def delta_of(model: Any, embeddings: str | None, norms: bool = False) -> Delta:
    """Random signs for every linear layer, and tables of its own, in 16 bits or in int8, and norms, if asked for."""
    matrices = {}
    for name, module in model.get_decoder().named_modules(prefix="model"):
        if isinstance(module, torch.nn.Linear):
            rows, columns = module.weight.shape
            bits = torch.randint(-(2**31), 2**31, (1, rows, columns // 32), device="cuda").int()
            matrices[f"{name}.weight"] = Matrix(bits, torch.full((1, 1, 1), 1e-3, device="cuda"))
    tables = {"model.embed_tokens.weight": model.model.embed_tokens.weight, "lm_head.weight": model.lm_head.weight}
    own = {name: x.detach() for name, x in tables.items()} if embeddings else {}
    codes = {name: to_int8(x) for name, x in own.items()} if embeddings == "int8" else {}
    dense = {**own, **{name: values for name, (values, _) in codes.items()}}
    for name, x in model.named_parameters():
        if norms and name.endswith("norm.weight"):
            dense[name] = x.detach() + 0.1 * torch.randn_like(x)
    return Delta("random", Base(), matrices, dense, {name: scale for name, (_, scale) in codes.items()})


def tenants_of(delta: Delta) -> dict[str, Delta]:
    """Fine-tunes of a kind, each with a head in memory of its own: else what one reads the L2 would hold for others."""
    heads = [name for name in delta.dense if name.startswith("lm_head")]
    return {
        f"tenant-{n}": replace(delta, dense={**delta.dense, **{name: delta.dense[name].clone() for name in heads}})
        for n in range(TENANTS)
    }


def milliseconds(model: Any, rows: int, **asked: Any) -> tuple[float, lc.Report]:
    """Median time of a step of `generate()`, and what the model then says of itself."""
    ids, clock = torch.randint(0, 1000, (rows, PROMPT), device="cuda"), Clock()
    knobs: dict[str, Any] = {"max_new_tokens": 64, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(ids, **knobs, streamer=clock, **asked)
    gaps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    report = lc.report(model)
    del out  # it held the cache, and the graphs
    return 1000 * statistics.median(gaps[len(gaps) // 3 :]), report


def load_seconds(size: int) -> float:
    """How long as many bytes take from pinned host memory to the GPU."""
    host = torch.empty(COPIED, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times) * size / COPIED


def floor(model: Any, delta: Delta, bandwidth: float) -> float:
    """Tokens per second if a step took no longer than to read what it must: weights, signs and heads of all tenants.

    Args:
        model: the base, whose table of embeddings is looked up in and not read.
        delta: of each tenant.
        bandwidth: bytes per second.
    """
    weights = sum(x.nbytes for x in model.parameters()) - model.get_input_embeddings().weight.nbytes
    signs = sum(matrix.bits.nbytes for matrix in delta.matrices.values())
    heads = sum(x.nbytes for name, x in delta.dense.items() if name.startswith("lm_head"))
    if heads:
        weights -= model.lm_head.weight.nbytes  # no row is the base's
    return TENANTS / ((weights + TENANTS * (signs + heads)) / bandwidth)


def tenant_rows(bandwidth: float) -> Iterator[dict[str, Any]]:
    """Rows where tenants have embeddings of their own, in 16 bits, in int8, and with norms, and where they have none.

    Args:
        bandwidth: bytes per second that a copy reads and writes.
    """
    model = model_8b()
    lc.patch(model, "dense")
    weights = sum(x.nbytes for x in model.parameters())
    (alone, _), loading = milliseconds(model, 1), load_seconds(weights)
    swapping = NEW / (loading + NEW * alone / 1000)
    for embeddings, norms in (("16 bits", False), ("int8", False), ("int8", True), (None, False)):
        delta = delta_of(model, embeddings, norms)
        tenants = tenants_of(delta)
        lc.deltas.load(model, tenants)
        held, size = weights + lc.deltas.report(model).device_bytes, delta.nbytes
        torch.cuda.reset_peak_memory_stats()
        step, report = milliseconds(model, TENANTS, adapter_names=list(tenants))
        together = TENANTS / step * 1000
        lc.deltas.unload(model)
        yield {
            "case": "generate(), 16 tenants of 8B in a batch, embeddings "
            + (f"of their own in {embeddings}" if embeddings else "shared")
            + (", norms of their own" if norms else ""),
            "value": round(together, 1),
            "unit": "tokens/s",
            "baseline": f"fine-tunes of 16 bits loaded in turn from pinned memory, {NEW} tokens each",
            "baseline_value": round(swapping, 1),
            "ratio": round(together / swapping, 2),
            "floor_value": round(floor(model, delta, bandwidth), 1),
            "must": ">= 10x, weights within the base's + 16 x (bits + embeddings)",
            "met": together >= 10 * swapping and held <= weights + TENANTS * size * 1.01,
            "shapes": {"rows": TENANTS, "tenants": TENANTS, "prompt": PROMPT},
            "ms_per_step": round(step, 3),
            "alone_ms_per_token": round(alone, 3),
            "load_seconds": round(loading, 3),
            "weight_bytes": held,
            "tenant_bytes": size,
            "graphs": report.graphs,
            "eager": report.eager,
        }
        del delta, tenants
        gc.collect()
        torch.cuda.empty_cache()
