"""DuoAttention: retrieval heads keep everything, streaming heads keep sinks and a window."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..cache.positions import Absolute
from ..models import ModelFacts
from ..plan import HeadPolicy, KVFormat, Plan
from .duo_heads import DuoHeads, Pattern
from .kv import kv_format
from .layouts import DENSE, require_full_attention, split


@dataclass(frozen=True)
class DuoAttention:
    """Per KV head: everything, or the first `sinks` and the last `window` tokens; positions are those of the text.

    Paper: DuoAttention (arXiv:2410.10819) §2.3. Differs: streaming heads see exactly sinks + window from the first
    token on, whatever the chunking; ties between gates are broken by layer and head; no weight is reordered.
    Dense at sparsity 0.

    Args:
        pattern: as in `DuoHeads`, like the next three.
        sparsity: share of the KV heads that stream, 0 to 1; the lowest gates stream.
        sinks: first tokens that streaming heads keep; None takes the pattern's.
        window: last tokens that streaming heads keep; None takes the pattern's.
        kv: how keys and values are stored: `native`, `int8` or `int4`.
    """

    pattern: Pattern | None = None
    sparsity: float = 0.5
    sinks: int | None = None
    window: int | None = None
    kv: str | KVFormat = "native"

    def __post_init__(self) -> None:
        self._heads  # noqa: B018 - a knob that makes no sense is refused here
        kv_format(self.kv, "DuoAttention")

    @property
    def _heads(self) -> DuoHeads:
        return DuoHeads(self.pattern, self.sparsity, self.sinks, self.window)

    def plan(self, facts: ModelFacts) -> Plan:
        """The plan for a model.

        Raises:
            UnsupportedError: no pattern is known for the model.
            ValueError: the pattern is for another number of layers or heads.
        """
        require_full_attention("duo_attention", facts)
        retrieval, window = self._heads.find(facts, "duo_attention")
        kv = kv_format(self.kv, "DuoAttention")
        streaming = HeadPolicy(window, Absolute(), kv=kv)
        return split("duo_attention", facts, retrieval, replace(DENSE, kv=kv), streaming)
