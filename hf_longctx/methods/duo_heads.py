"""Which KV heads retrieve and which stream, by a pattern of gates."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..cache.retention import SinkWindow
from ..errors import UnsupportedError
from ..heads import HeadPattern, check_pattern, find_pattern, load_pattern, retrieval_heads
from ..models import ModelFacts

Pattern = str | os.PathLike[str] | Sequence[Sequence[float]] | HeadPattern


@dataclass(frozen=True)
class DuoHeads:
    """KV heads with low gates stream; the others do what a method wants.

    Paper: DuoAttention (arXiv:2410.10819) §2. For `patch(model, heads=DuoHeads(...))`, beside other methods.

    Args:
        pattern: gates per KV head: a folder or file in the published format, the name of a shipped pattern, or the
            gates themselves `[L][Hkv]`; None finds a shipped one for the model.
        sparsity: share of the KV heads that stream, 0 to 1; the lowest gates stream.
        sinks: first tokens that streaming heads keep; None takes the pattern's.
        window: last tokens that streaming heads keep; None takes the pattern's.
    """

    pattern: Pattern | None = None
    sparsity: float = 0.5
    sinks: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        SinkWindow(0 if self.sinks is None else self.sinks, 1 if self.window is None else self.window)
        if not 0 <= self.sparsity <= 1:
            raise ValueError(
                f"DuoHeads: expected sparsity between 0 (all heads retrieve) and 1 (all stream); got "
                f"{self.sparsity!r}. The paper uses 0.5 with grouped KV heads and 0.75 without."
            )

    def find(self, facts: ModelFacts, method: str) -> tuple[tuple[tuple[bool, ...], ...], SinkWindow]:
        """`[L][Hkv]`, True for a head that retrieves, and what the others keep.

        Args:
            facts: of the model.
            method: for messages.

        Raises:
            UnsupportedError: no pattern is known for the model.
            ValueError: the pattern is for another number of layers or heads.
        """
        found = find_pattern(facts.config, facts.name) if self.pattern is None else load_pattern(self.pattern)
        if found is None:
            raise UnsupportedError(
                f"{method}: expected a published head pattern for '{facts.name or facts.family}' "
                f"({len(facts.layers)} layers, {facts.layers[0].kv_heads} KV heads); got none that fits. "
                "Pass pattern= with a folder in the published format."
            )
        check_pattern(found, len(facts.layers), [layer.kv_heads for layer in facts.layers])
        sink = found.sink if self.sinks is None else self.sinks
        window = found.window if self.window is None else self.window
        return retrieval_heads(found, self.sparsity), SinkWindow(sink, window)
