"""Time of a call that takes microseconds: from memory, not from a cache; on a GPU without the host's share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any

import torch

Call = Callable[[], Any]

ROUND_BYTES = 192 << 20
"""What a round through all copies of the arguments reads at least: several times the last cache."""

_ROUND_S = 0.02
_MOST = 64


def copies(nbytes: float) -> int:
    """Copies of the arguments, so that none is in a cache when its turn comes."""
    return max(1, min(_MOST, int(-(-ROUND_BYTES // max(nbytes, 1)))))


def microseconds(calls: Sequence[Call], device: torch.device, repeats: int) -> tuple[float, float, float]:
    """Median, p10 and p90 of the time of a call: of rounds through all of them, as many as `repeats`.

    On a GPU a round is replayed from one CUDA graph, unless a call cannot be recorded.
    """
    for call in calls[:2]:
        call()
    rounds = _rounds_of_cuda(calls, repeats) if device.type == "cuda" else _rounds(calls, repeats)
    each = sorted(1e6 * seconds / len(calls) for seconds in rounds)
    tenths = quantiles(each, n=10, method="inclusive") if len(each) > 1 else each * 9
    return median(each), tenths[0], tenths[-1]


def _rounds(calls: Sequence[Call], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append(time.perf_counter() - start)
    return times


def _rounds_of_cuda(calls: Sequence[Call], repeats: int) -> list[float]:
    replay = _recorded(calls)
    times = []
    for _ in range(repeats + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return times[1:]


def _recorded(calls: Sequence[Call]) -> Call:
    """All calls as one replay; or one after the other, where something waits for the device."""

    def eagerly() -> None:
        for call in calls:
            call()

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eagerly()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            eagerly()
    except RuntimeError:  # such a call cannot be recorded
        torch.cuda.synchronize()
        return eagerly
    return graph.replay
