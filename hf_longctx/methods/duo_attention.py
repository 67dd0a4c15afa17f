"""DuoAttention: retrieval heads keep everything, streaming heads keep sinks and a window."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..cache.positions import Absolute
from ..cache.retention import SinkWindow
from ..errors import UnsupportedError
from ..heads import HeadPattern, check_pattern, find_pattern, load_pattern, retrieval_heads
from ..models import ModelFacts
from ..plan import HeadPolicy, Plan
from .layouts import DENSE, require_full_attention, split


@dataclass(frozen=True)
class DuoAttention:
    """Per KV head: everything, or the first `sinks` and the last `window` tokens; positions are those of the text.

    Paper: DuoAttention (arXiv:2410.10819) §2.3. Differs: streaming heads see exactly sinks + window from the first
    token on, whatever the chunking; ties between gates are broken by layer and head; no weight is reordered.
    Dense at sparsity 0.

    Args:
        pattern: gates per KV head: a folder or file in the published format, the name of a shipped pattern, or the
            gates themselves `[L][Hkv]`; None finds a shipped one for the model.
        sparsity: share of the KV heads that stream, 0 to 1; the lowest gates stream.
        sinks: first tokens that streaming heads keep; None takes the pattern's.
        window: last tokens that streaming heads keep; None takes the pattern's.
    """

    pattern: str | os.PathLike[str] | Sequence[Sequence[float]] | HeadPattern | None = None
    sparsity: float = 0.5
    sinks: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        SinkWindow(0 if self.sinks is None else self.sinks, 1 if self.window is None else self.window)
        if not 0 <= self.sparsity <= 1:
            raise ValueError(
                f"DuoAttention: expected sparsity between 0 (all heads retrieve) and 1 (all stream); got "
                f"{self.sparsity!r}. The paper uses 0.5 with grouped KV heads and 0.75 without."
            )

    def plan(self, facts: ModelFacts) -> Plan:
        """The plan for a model.

        Raises:
            UnsupportedError: no pattern is known for the model.
            ValueError: the pattern is for another number of layers or heads.
        """
        require_full_attention("duo_attention", facts)
        found = find_pattern(facts.config, facts.name) if self.pattern is None else load_pattern(self.pattern)
        if found is None:
            raise UnsupportedError(
                f"duo_attention: expected a published head pattern for '{facts.name or facts.family}' "
                f"({len(facts.layers)} layers, {facts.layers[0].kv_heads} KV heads); got none that fits. "
                "Pass pattern= with a folder in the published format."
            )
        check_pattern(found, len(facts.layers), [layer.kv_heads for layer in facts.layers])
        sink = found.sink if self.sinks is None else self.sinks
        window = found.window if self.window is None else self.window
        streaming = HeadPolicy(SinkWindow(sink, window), Absolute())
        return split("duo_attention", facts, retrieval_heads(found, self.sparsity), DENSE, streaming)
