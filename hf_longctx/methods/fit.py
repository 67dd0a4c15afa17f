"""Whether a plan is one for a model."""

from __future__ import annotations

from ..models import ModelFacts
from ..plan import HeadGroup, Plan

_CHOOSING = {"q_head": "query heads", "kv_head": "KV heads"}


def check_plan(plan: Plan, facts: ModelFacts, where: str = "patch") -> None:
    """Refuse a plan that is not for a model of these layers and heads.

    Raises:
        ValueError: names the first layer that differs.
    """
    expected = [layer.kv_heads for layer in facts.layers]
    got = [layer.kv_heads for layer in plan.layers]
    if expected != got:
        here = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
        raise ValueError(
            f"{where}: expected a plan for {len(expected)} layers"
            + ("" if here is None else f" with {expected[here]} KV heads in layer {here}")
            + f"; got plan '{plan.method}' with {len(got)} layers"
            + ("" if here is None else f" and {got[here]} KV heads there")
            + ". Make the plan for this model."
        )
    for i, (layer, its) in enumerate(zip(plan.layers, facts.layers, strict=True)):
        for group in layer.groups:
            _check_shares(group, its.q_heads // its.kv_heads, f"{where}: plan '{plan.method}', layer {i}")


def _check_shares(group: HeadGroup, per_kv: int, where: str) -> None:
    """Refuse shares of attention that are neither one nor one for each choice of the group."""
    for phase, selector in (("prefill", group.policy.prefill), ("decode", group.policy.decode)):
        if selector is None or selector.budget.shares is None:
            continue
        got, choices = len(selector.budget.shares), selector.choices(len(group.kv_heads), per_kv)
        if got not in (1, choices):
            each = f", or one for each of {choices} {_CHOOSING[selector.share]}" if selector.share in _CHOOSING else ""
            raise ValueError(
                f"{where}, {phase}: expected one tau{each}; got {got}. Tune thresholds for this model and this sharing."
            )
