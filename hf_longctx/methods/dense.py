"""Stock attention over our cache: nothing is dropped, nothing is skipped."""

from __future__ import annotations

from dataclasses import dataclass

from ..models import ModelFacts
from ..plan import Plan
from .layouts import DENSE, uniform


@dataclass(frozen=True)
class Dense:
    """Every head keeps and reads everything; equal to the unpatched model."""

    def plan(self, facts: ModelFacts) -> Plan:
        """The plan for a model."""
        return uniform("dense", facts, DENSE)
