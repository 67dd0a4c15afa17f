"""What `patch(model)` does when nothing is asked for: dense while that is fastest, then what the model supports."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..models import ModelFacts
from ..plan import KVFormat, Plan
from .dense import Dense
from .quest import Quest

BUDGET = 4096
"""Tokens that a decode step reads: the budget at which Quest's and LServe's papers see no loss up to 128K."""


@dataclass(frozen=True)
class Auto:
    """Dense and equal to the unpatched model up to `budget` tokens; beyond, decode steps read `budget` tokens.

    Nothing is ever evicted and prompts are read whole, so that no text is out of reach.

    Args:
        budget: tokens that a decode step reads; whole pages of 16.
        kv: how keys and values are stored: `native`, `int8` or `int4`.
    """

    budget: int = BUDGET
    kv: str | KVFormat = "native"

    def __post_init__(self) -> None:
        Quest(self.budget, kv=self.kv)

    def plan(self, facts: ModelFacts) -> Plan:
        """The plan for a model, and why it is this one."""
        full = sum(layer.window is None for layer in facts.layers)
        dense_first = Quest().dense_layers
        if full <= dense_first:
            why = f"dense: {full} of {len(facts.layers)} layers have full attention, too few to gain from a choice"
            return replace(Dense(kv=self.kv).plan(facts), method="auto: dense", why=why)
        why = (
            f"quest: up to {self.budget} tokens everything is read, as by the unpatched model; beyond, decode steps "
            f"read {self.budget} tokens in all but the first {dense_first} layers, and nothing is forgotten"
        )
        return replace(Quest(self.budget, kv=self.kv).plan(facts), method="auto: quest", why=why)
