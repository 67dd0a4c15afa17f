"""What `patch(model)` does when nothing is asked for: dense while that is fastest, and what fits a length."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UnsupportedError
from ..memory import available_beside
from ..models import ModelFacts
from ..plan import KVFormat, Plan, require_whole
from ..tune.crossover import Crossover, cached_path, read_crossover
from .compose import compose
from .dense import Dense
from .fitting import first_that_fits
from .quest import Quest
from .xattention import XAttention

BUDGET = 4096
"""Tokens that a decode step reads: the budget at which Quest's and LServe's papers see no loss up to 128K."""


@dataclass(frozen=True)
class Auto:
    """Dense and equal to the unpatched model up to where another method is faster; nothing is ever evicted.

    Beyond, decode steps read `budget` tokens. Prompts are read whole, unless it was measured from which length on
    `XAttention` reads them faster. With a `context`, the first of these and of what holds less that fits on the device;
    beyond the trained length, methods with positions that the model knows come first.

    Args:
        budget: tokens that a decode step reads; whole pages of 16.
        kv: how keys and values are stored: `native`, `int8` or `int4`.
        crossover: from which lengths on methods are faster, as `hf-longctx tune crossover` measured it with keys and
            values as the model makes them: its file, or what that holds; None: what it left in the cache folder for
            this device, family and dtype, or else decode steps that choose from `budget` tokens on.
        context: tokens that each row will have in the end; None: unknown, and nothing is ever dropped.
        batch: rows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a budget that makes no sense, or a file that is no such measurement.
    """

    budget: int = BUDGET
    kv: str | KVFormat = "native"
    crossover: str | os.PathLike[str] | Mapping[str, Any] | None = None
    context: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        require_whole("Auto", batch=self.batch, context=1 if self.context is None else self.context)
        Quest(self.budget, kv=self.kv)
        if self.crossover is not None:
            read_crossover(self.crossover)

    def plan(self, facts: ModelFacts) -> Plan:
        """The plan for a model, and why it is this one.

        Raises:
            ValueError: a measurement of another family, device, dtype or budget.
            MemoryError: no method fits.
            UnsupportedError: a context, for a model over several processes.
        """
        if self.context is None:
            return self.fastest(facts)
        if facts.ranks > 1:
            raise UnsupportedError(
                f"auto: expected no context on a model over {facts.ranks} processes, each of which would choose for "
                f"itself; got {self.context}. Name a method."
            )
        found = first_that_fits(facts, self, self.context, self.batch, available_beside(facts))
        return replace(found.plan, method=f"auto: {found.plan.method.removeprefix('auto: ')}", why=found.why)

    def fastest(self, facts: ModelFacts) -> Plan:
        """The plan that drops nothing, whatever the length."""
        full = sum(layer.window is None for layer in facts.layers)
        quest = Quest(self.budget, kv=self.kv)
        if full <= quest.dense_layers:
            why = f"dense: {full} of {len(facts.layers)} layers have full attention, too few to gain from a choice"
            return replace(Dense(kv=self.kv).plan(facts), method="auto: dense", why=why)
        found = self._measured(facts)
        if found is not None:
            return self._faster(found, facts)
        why = (
            f"quest: up to {self.budget} tokens everything is read, as by the unpatched model; beyond, decode steps "
            f"read {self.budget} tokens in all but the first {quest.dense_layers} layers, and nothing is forgotten; "
            "where that is faster was not measured on this device (`hf-longctx tune crossover` does)"
        )
        return replace(quest.plan(facts), method="auto: quest", why=why)

    def _measured(self, facts: ModelFacts) -> Crossover | None:
        """What was measured for this model; a file that nobody named may be of another budget, and is then none."""
        here = facts.family, facts.device, facts.dtype
        kept = cached_path(*here)
        if self.crossover is None and not kept.is_file():
            return None
        found = read_crossover(kept if self.crossover is None else self.crossover)
        found.check(*here)
        if found.budget == self.budget:
            return found
        if self.crossover is None:
            return None
        raise ValueError(
            f"{found.source}: expected times for a budget of {self.budget}; got {found.budget}. Use "
            f"budget={found.budget}, or measure again with `hf-longctx tune crossover --budget {self.budget}`."
        )

    def _faster(self, found: Crossover, facts: ModelFacts) -> Plan:
        """Each method from where it was faster on."""
        start = {name: found.faster_from(name) for name in ("xattention", "quest")}
        prefill: Dense | XAttention = Dense(self.kv)
        decode: Dense | Quest = Dense(self.kv)
        if start["xattention"] is not None:
            prefill = XAttention(kv=self.kv, dense_below=start["xattention"])
        if start["quest"] is not None:
            decode = Quest(self.budget, kv=self.kv, dense_below=start["quest"])
        names = [name for name, first in start.items() if first is not None]
        plan = compose(facts, prefill, decode)
        return replace(plan, method=f"auto: {' + '.join(names) or 'dense'}", why=found.describe())
