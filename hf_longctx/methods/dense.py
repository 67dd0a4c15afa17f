"""Stock attention over our cache: nothing is dropped, nothing is skipped."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..models import ModelFacts
from ..plan import KVFormat, Plan
from .kv import kv_format
from .layouts import DENSE, uniform


@dataclass(frozen=True)
class Dense:
    """Every head keeps and reads everything; equal to the unpatched model where `kv` is native.

    Args:
        kv: how keys and values are stored: `native`, `int8` or `int4`.
    """

    kv: str | KVFormat = "native"

    def __post_init__(self) -> None:
        kv_format(self.kv, "Dense")

    def plan(self, facts: ModelFacts) -> Plan:
        """The plan for a model."""
        return uniform("dense", facts, replace(DENSE, kv=kv_format(self.kv, "Dense")))
