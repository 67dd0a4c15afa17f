"""StreamingLLM: attention sinks and a window, with positions counted in the cache."""

from __future__ import annotations

from dataclasses import dataclass

from ..cache.positions import InCache
from ..cache.retention import SinkWindow
from ..models import ModelFacts
from ..plan import HeadPolicy, KVFormat, Plan
from .kv import kv_format
from .layouts import require_full_attention, require_small_positions, uniform


@dataclass(frozen=True)
class StreamingLLM:
    """A query sees the first `sinks` tokens and the last `window`, itself included, as if they stood side by side.

    Paper: StreamingLLM (arXiv:2309.17453) §3.2. Differs: the same rule holds inside a prompt too, so that prefill is
    O(T * (sinks + window)) and any chunking of the input gives the same logits; the authors' code attends densely
    within a call. Dense where sinks + window >= length.

    Args:
        sinks: first real tokens of each row that are never evicted; 0 gives the window-only baseline.
        window: last tokens that stay.
        kv: how keys and values are stored: `native`, `int8` or `int4`.
    """

    sinks: int = 4
    window: int = 1020
    kv: str | KVFormat = "native"

    def __post_init__(self) -> None:
        SinkWindow(self.sinks, self.window)
        kv_format(self.kv, "StreamingLLM")

    def plan(self, facts: ModelFacts) -> Plan:
        """The plan for a model.

        Raises:
            UnsupportedError: positions cannot be counted in the cache, or not as far as sinks + window.
        """
        require_full_attention("streaming_llm", facts)
        require_small_positions("streaming_llm", facts, "sinks + window", (self.sinks, self.window))
        kv = kv_format(self.kv, "StreamingLLM")
        return uniform("streaming_llm", facts, HeadPolicy(SinkWindow(self.sinks, self.window), InCache(), kv=kv))
