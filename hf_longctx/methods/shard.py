"""What one process of several does of a plan: under tensor parallelism each has heads of its own."""

from __future__ import annotations

from dataclasses import replace

from ..errors import UnsupportedError
from ..models import LayerFacts, ModelFacts
from ..plan import HeadGroup, LayerPlan, Plan
from .layouts import part


def own_facts(facts: ModelFacts) -> ModelFacts:
    """The facts of the heads that this process has."""

    def own(layer: LayerFacts) -> LayerFacts:
        return replace(layer, q_heads=layer.q_heads // facts.ranks, kv_heads=layer.kv_heads // facts.ranks)

    return facts if facts.ranks == 1 else replace(facts, layers=tuple(map(own, facts.layers)))


def own_plan(plan: Plan, facts: ModelFacts) -> Plan:
    """What a plan says of the heads that this process has, numbered from 0; thresholds of single heads go with them.

    Args:
        plan: for all heads.
        facts: of the whole model.

    Raises:
        UnsupportedError: all heads share one choice, which no process could make alone; or processes would rotate at
            different positions.
    """
    if facts.ranks == 1:
        return plan
    every = [_own(plan, facts, rank) for rank in range(facts.ranks)]  # refused in all processes or in none
    if len({(own.bounded, own.at_read) for own in every}) > 1:
        raise UnsupportedError(
            f"{plan.method}: expected positions that are counted alike on each of {facts.ranks} processes; got heads "
            "that count them in the cache on some only. Give each process a head of each kind, or use one process."
        )
    return every[facts.rank]


def _own(plan: Plan, facts: ModelFacts, rank: int) -> Plan:
    layers = []
    for i, (layer, its) in enumerate(zip(plan.layers, facts.layers, strict=True)):
        size = its.kv_heads // facts.ranks
        first, groups = rank * size, []
        for group in layer.groups:
            _check_choices(group, f"{plan.method}, layer {i}", facts.ranks)
            heads = tuple(head for head in group.kv_heads if first <= head < first + size)
            if heads:
                own = part(group, heads, its.q_heads // its.kv_heads)
                groups.append(replace(own, kv_heads=tuple(head - first for head in heads)))
        layers.append(LayerPlan(tuple(groups)))
    return replace(plan, layers=tuple(layers))


def _check_choices(group: HeadGroup, where: str, ranks: int) -> None:
    for selector in (group.policy.prefill, group.policy.decode):
        if selector is not None and selector.share == "all":
            raise UnsupportedError(
                f"{where}: expected heads that choose for themselves on a model over {ranks} processes; got one choice "
                "for all heads, of which each process has a part. Use share='kv_head'."
            )
