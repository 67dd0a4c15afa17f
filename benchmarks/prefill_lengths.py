"""Time to the first token at lengths from 1K on, stock and patched, on Llama 3 8B's shape with random weights."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from decode_generate import GATES, K, model_8b

import hf_longctx as lc

LENGTHS = tuple(size * K for size in (1, 2, 4, 8, 16, 32))
METHODS: dict[str, Any] = {
    "stock": None,
    "dense": lc.Dense(),
    "xattention": lc.XAttention(),
    "lserve": lc.LServe(pattern=GATES),
}
MUST = 1 / 1.03
ROUNDS = 3
"""Methods take turns so many times, so that what else the machine does meets all of them alike."""

LONG = 16 * K
"""From this length on there is one round, as a run takes long."""

LEAST, MOST = 1, 8
"""Runs in a round; between them as many as fit into `SECONDS`."""

SECONDS = 0.3


def first_token(model: Any, ids: torch.Tensor) -> float:
    """Milliseconds of a prompt and its first token."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def measure(model: Any, tokens: int) -> list[float]:
    """Milliseconds to the first token of some runs, after one that is not counted."""
    gc.collect()
    torch.cuda.empty_cache()
    ids = torch.randint(0, 128256, (1, tokens), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    first_token(model, ids)
    runs: list[float] = []
    while len(runs) < LEAST or (len(runs) < MOST and sum(runs) < 1000 * SECONDS):
        runs.append(first_token(model, ids))
    return runs


def times(model: Any) -> dict[tuple[str, int], float]:
    """Median milliseconds to the first token, by method and length."""
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(ROUNDS):
        for name, method in METHODS.items():
            if method is None:
                lc.unpatch(model)
            else:
                lc.patch(model, method)
            for tokens in LENGTHS:
                if number == 0 or tokens < LONG:
                    found.setdefault((name, tokens), []).extend(measure(model, tokens))
    return {key: statistics.median(runs) for key, runs in found.items()}


@torch.no_grad()
def length_rows() -> Iterator[dict[str, Any]]:
    """A row for each method and length."""
    model = model_8b()
    taken = times(model)
    for name in list(METHODS)[1:]:
        for tokens in LENGTHS:
            value, base = taken[name, tokens], taken["stock", tokens]
            yield {
                "case": f"TTFT {tokens // K}K, {name}, against stock",
                "value": round(value, 2),
                "unit": "ms",
                "density": None,
                "baseline": f"TTFT {tokens // K}K, stock",
                "baseline_value": round(base, 2),
                "ratio": round(base / value, 3),
                "floor_value": None,
                "must": f">= {MUST:.3g}x",
                "met": base / value >= MUST,
                "shapes": {"rows": 1, "tokens": tokens},
            }
