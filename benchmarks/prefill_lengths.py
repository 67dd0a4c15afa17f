"""Time to the first token at lengths from 1K on, stock and patched, on Llama 3 8B's shape with random weights."""

from __future__ import annotations

import gc
import statistics
import time
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
SHORT = LENGTHS[:2]
OTHERS: dict[str, Any] = {
    "duo_attention": lc.DuoAttention(pattern=GATES),
    "quest": lc.Quest(),
    "streaming_llm": lc.StreamingLLM(),
    "inf_llm": lc.InfLLM(),
}
"""Methods that are measured at these lengths alone."""

MUST, HOST_MUST = 1 / 1.03, 1.0
ROUNDS = 4
"""Methods take turns so many times, so that what else the machine does meets all of them alike."""

LONG = 16 * K
"""From this length on there is one round, as a run takes long."""

LEAST, MOST = 1, 4
"""Runs in a turn; between them as many as fit into `SECONDS`."""

SECONDS = 0.12
FEW, CALLS = 128, 6
"""Tokens of a prompt of which the host's part is timed, for which the GPU takes less, and calls in a turn."""


def first_token(model: Any, ids: torch.Tensor) -> float:
    """Milliseconds of a prompt and its first token."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def enqueued(model: Any, ids: torch.Tensor) -> float:
    """Milliseconds of the host until all of a prompt is on its way."""
    mask = torch.ones_like(ids)
    torch.cuda.synchronize()
    start = time.perf_counter()
    model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    return 1000 * (time.perf_counter() - start)


def text(tokens: int) -> torch.Tensor:
    """`[1, tokens]`, the same each time."""
    return torch.randint(0, 128256, (1, tokens), device="cuda", generator=torch.Generator("cuda").manual_seed(0))


def measure(model: Any, tokens: int) -> list[float]:
    """Milliseconds to the first token of some runs, after one that is not counted."""
    ids = text(tokens)
    first_token(model, ids)
    runs: list[float] = []
    while len(runs) < LEAST or (len(runs) < MOST and sum(runs) < 1000 * SECONDS):
        runs.append(first_token(model, ids))
    return runs


def times(model: Any) -> dict[tuple[str, int], float]:
    """Milliseconds to the first token in the quietest round, by method and length; by 0 those of the host alone.

    A round's are the median of its runs. Short prompts wait for the host, which others use, too: that only adds.
    """
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(ROUNDS):
        for name, method in {**METHODS, **OTHERS}.items():
            if method is None:
                lc.unpatch(model)
            else:
                lc.patch(model, method)
            gc.collect()
            torch.cuda.empty_cache()
            ids = text(FEW)
            host = [enqueued(model, ids) for _ in range(CALLS)][1:]
            found.setdefault((name, 0), []).append(statistics.median(host))
            for tokens in LENGTHS if name in METHODS else SHORT:
                if number == 0 or tokens < LONG:
                    found.setdefault((name, tokens), []).append(statistics.median(measure(model, tokens)))
    return {key: min(rounds) for key, rounds in found.items()}


@torch.no_grad()
def length_rows() -> Iterator[dict[str, Any]]:
    """A row for each method and length, and for what the host does."""
    taken = times(model_8b())
    names = [name for name in {**METHODS, **OTHERS} if name != "stock"]
    for name, tokens in ((name, tokens) for name in names for tokens in (0, *LENGTHS) if (name, tokens) in taken):
        value = taken[name, tokens]
        what, base = f"TTFT {tokens // K}K" if tokens else "host time of a prompt", taken["stock", tokens]
        must = MUST if tokens else HOST_MUST
        yield {
            "case": f"{what}, {name}, against stock",
            "value": round(value, 2),
            "unit": "ms",
            "density": None,
            "baseline": f"{what}, stock",
            "baseline_value": round(base, 2),
            "ratio": round(base / value, 3),
            "floor_value": None,
            "must": f">= {must:.3g}x",
            "met": base / value >= must,
            "shapes": {"rows": 1, "tokens": tokens or FEW},
        }
