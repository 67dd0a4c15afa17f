"""StreamingLLM: attention sinks and a window, with positions counted in the cache."""

from __future__ import annotations

from dataclasses import dataclass

from ..cache.positions import InCache
from ..cache.retention import SinkWindow
from ..errors import UnsupportedError
from ..models import ModelFacts
from ..plan import HeadPolicy, Plan
from .layouts import require_full_attention, uniform


@dataclass(frozen=True)
class StreamingLLM:
    """A query sees the first `sinks` tokens and the last `window`, itself included, as if they stood side by side.

    Paper: StreamingLLM (arXiv:2309.17453) §3.2. Differs: the same rule holds inside a prompt too, so that prefill is
    O(T * (sinks + window)) and any chunking of the input gives the same logits; the authors' code attends densely
    within a call. Dense where sinks + window >= length.

    Args:
        sinks: first real tokens of each row that are never evicted; 0 gives the window-only baseline.
        window: last tokens that stay.
    """

    sinks: int = 4
    window: int = 1020

    def __post_init__(self) -> None:
        SinkWindow(self.sinks, self.window)

    def plan(self, facts: ModelFacts) -> Plan:
        """The plan for a model.

        Raises:
            UnsupportedError: positions cannot be counted in the cache, or not as far as sinks + window.
        """
        require_full_attention("streaming_llm", facts)
        if facts.not_in_cache:
            raise UnsupportedError(
                f"streaming_llm: expected positions that can be counted in the cache; got '{facts.family}': "
                f"{facts.not_in_cache}. Use 'dense' or 'duo_attention'."
            )
        if facts.longest_in_cache is not None and self.sinks + self.window > facts.longest_in_cache:
            raise UnsupportedError(
                f"streaming_llm: expected sinks + window <= {facts.longest_in_cache} for '{facts.family}', because its "
                f"rotary frequencies change beyond that length; got {self.sinks} + {self.window}. "
                f"Use window={facts.longest_in_cache - self.sinks} or less."
            )
        return uniform("streaming_llm", facts, HeadPolicy(SinkWindow(self.sinks, self.window), InCache()))
