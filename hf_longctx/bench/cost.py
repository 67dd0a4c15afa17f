"""What one prompt and some tokens after it cost: times, bytes, and the tokens themselves."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..evals.respond import Ticks, greedy
from ..models import CACHE
from ..prompt import PIECE
from .live import held

SETTLE = 8
"""First decode steps that are not counted: on a GPU they record the step as a CUDA graph."""

_WARM = {"cpu": 64}
"""Tokens of the prompt that are read before the clock starts, by type of device; a piece of a prompt elsewhere."""


@dataclass(frozen=True)
class Cost:
    """Of one batch.

    Attributes:
        prefill_s: from where `generate` begins to read the prompt to the first new token.
        ttft_s: from the call of `generate` to the first new token.
        gaps_ms: from each new token to the next, the first `SETTLE` aside.
        kv_bytes: that the cache holds on the device at the end, of all rows.
        host_bytes: and beside it.
        dense_kv_bytes: that all tokens in all heads would take there, of all rows.
        peak_bytes: most bytes given out on the device, weights included; None on a CPU, which does not count them.
        eager: why steps were not recorded as CUDA graphs; None: they were, or nothing is recorded here.
        new: `[B, N]`, int64, on the CPU: the new tokens.
    """

    prefill_s: float
    ttft_s: float
    gaps_ms: tuple[float, ...]
    kv_bytes: int
    host_bytes: int
    dense_kv_bytes: int | None
    peak_bytes: int | None
    eager: str | None
    new: Tensor


def warm(model: Any, ids: Tensor, extra: dict[str, Any]) -> None:
    """Read the start of the prompts and go on a little, so that kernels are loaded and memory is there."""
    free()
    greedy(model, ids[:, : _WARM.get(ids.device.type, PIECE)], SETTLE + 1, SETTLE + 1, Ticks(), **extra)


def cost(model: Any, ids: Tensor, tokens: int, extra: dict[str, Any]) -> Cost:
    """Measure one batch, greedily, whatever the model says: no end-of-sequence token ends it.

    Args:
        model: patched or not.
        ids: `[B, T]`, int64, on the model's device.
        tokens: decode steps that are counted.
        extra: for `generate`.
    """
    on_gpu = ids.is_cuda
    if on_gpu:
        free()  # a cache may be part of a cycle, and would count for the next
        torch.cuda.reset_peak_memory_stats(ids.device)
        torch.cuda.synchronize(ids.device)
    clock, new = Ticks(), tokens + SETTLE + 1
    start = time.perf_counter()
    out = greedy(model, ids, new, new, clock, **extra)
    begun, *times = clock.times
    gaps = [1000 * (b - a) for a, b in pairwise(times)]
    peak = torch.cuda.max_memory_allocated(ids.device) if on_gpu else None
    kv, host, dense, eager = _bytes(model, getattr(out, CACHE), ids.device)
    said = out.sequences[:, ids.shape[1] :].cpu()
    return Cost(times[0] - begun, times[0] - start, tuple(gaps[SETTLE:]), kv, host, dense, peak, eager, said)


def free() -> None:
    """Give back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice, by whichever allocator."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _bytes(model: Any, cache: Any, device: torch.device) -> tuple[int, int, int | None, str | None]:
    """Of the cache on the device and beside it, of dense attention, and why steps ran eagerly."""
    from .. import LongContextCache, report

    if isinstance(cache, LongContextCache):
        seen = report(model)
        return seen.kv_bytes, seen.host_bytes, seen.dense_kv_bytes, seen.eager
    return *held(cache, device), None, None
