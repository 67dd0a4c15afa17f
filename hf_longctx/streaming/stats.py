"""A session in numbers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

LAST = 4096
"""Rounds over which latencies are looked at."""


@dataclass(frozen=True)
class Stats:
    """A session so far.

    Args:
        rounds: answered, of all streams together.
        frames: that went in.
        frames_dropped: that did not: lost by their sources, or come while the session was paused.
        tokens: that came out.
        latency_p50_s, latency_p99_s: of a round of all streams, from its frames to its last token, over the last 4096
            rounds; 0 before the first.
        tokens_held: tokens in the cache, of each stream.
        bytes_held: bytes of keys, values and positions, on all devices.
    """

    rounds: int
    frames: int
    frames_dropped: int
    tokens: int
    latency_p50_s: float
    latency_p99_s: float
    tokens_held: tuple[int, ...]
    bytes_held: int


@dataclass
class Meter:
    """What is counted.

    Args:
        t: where each stream stands, in seconds.
        rounds: of each stream.
        frames: that went in.
        dropped: that came while the session was paused.
        tokens: that came out.
        latencies: seconds of the last rounds.
    """

    t: list[float]
    rounds: list[int]
    frames: int = 0
    dropped: int = 0
    tokens: int = 0
    latencies: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))

    @staticmethod
    def of(streams: int) -> Meter:
        """Nothing counted yet."""
        return Meter([0.0] * streams, [0] * streams)

    def stats(self, sources: Sequence[Any], held: Sequence[int], bytes_held: int) -> Stats:
        """All of it, with what the cache holds and what sources lost."""
        lost = sum(source.counts.dropped for source in sources if hasattr(source, "counts"))
        last = sorted(self.latencies)
        low, high = (last[math.ceil(share * len(last)) - 1] if last else 0.0 for share in (0.5, 0.99))
        return Stats(
            sum(self.rounds), self.frames, self.dropped + lost, self.tokens, low, high, tuple(held), bytes_held
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {**vars(self), "latencies": list(self.latencies)}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Meter:
        """What `to_dict` gave."""
        return Meter(**{**values, "latencies": deque(values["latencies"], maxlen=LAST)})
