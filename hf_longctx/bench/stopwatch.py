"""Time of a call that takes microseconds: from memory, not from a cache; on a GPU without the host's share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

Call = Callable[[], Any]

ROUND_BYTES = 192 << 20
"""What a round through all copies of the arguments reads at least: several times the last cache."""

_ROUND_S = 0.02
_MOST = 64


def copies(nbytes: float) -> int:
    """Copies of the arguments, so that none is in a cache when its turn comes; no more than 64 of small ones."""
    return max(1, min(_MOST, int(-(-ROUND_BYTES // max(nbytes, 1)))))


@dataclass(frozen=True)
class Time:
    """Of a call, over some rounds through all of them.

    Attributes:
        us: median, in microseconds; p10 and p90 likewise.
        recorded: rounds were replayed from one CUDA graph; False: a call cannot be recorded, and the host's share is
            in the time; None: nothing is recorded on this device.
    """

    us: float
    p10_us: float
    p90_us: float
    recorded: bool | None


def measure(calls: Sequence[Call], device: torch.device, repeats: int) -> Time:
    """Time of a call: of rounds through all of them, as many as `repeats`."""
    for call in calls[:2]:
        call()
    rounds, recorded = _rounds_of_cuda(calls, repeats) if device.type == "cuda" else (_rounds(calls, repeats), None)
    each = sorted(1e6 * seconds / len(calls) for seconds in rounds)
    tenths = quantiles(each, n=10, method="inclusive") if len(each) > 1 else each * 9
    return Time(median(each), tenths[0], tenths[-1], recorded)


def _rounds(calls: Sequence[Call], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append(time.perf_counter() - start)
    return times


def _rounds_of_cuda(calls: Sequence[Call], repeats: int) -> tuple[list[float], bool]:
    replay, recorded = _recorded(calls)
    times = []
    for _ in range(repeats + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1000)
    return times[1:], recorded


def _recorded(calls: Sequence[Call]) -> tuple[Call, bool]:
    """All calls as one replay; or one after the other, where something waits for the device. And which of both."""

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
        return eagerly, False
    return graph.replay, True
