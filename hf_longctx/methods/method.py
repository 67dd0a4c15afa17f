"""What a method is."""

from __future__ import annotations

from typing import Protocol

from ..models import ModelFacts
from ..plan import Plan


class Method(Protocol):
    """A system's knobs, and the plan that they make."""

    def plan(self, facts: ModelFacts) -> Plan:
        """The plan for a model; raises UnsupportedError or ValueError if there is none."""
