"""Lengths of the text up to which a group of heads does the same in every decode call."""

from __future__ import annotations

import math

from .cache.pages import Pages
from .plan import HeadPolicy, Plan, Selector


def reads_all_to(selector: Selector) -> float:
    """The longest text of which no query leaves a block out, as its number of tokens alone says."""
    if min(selector.budget.shares or (0.0,)) >= 1:
        return math.inf
    tokens = selector.budget.tokens
    fits = 0 if tokens is None else tokens + selector.sink_blocks * selector.block + selector.block
    return max(selector.dense_below, fits, selector.local)


def straight_to(plan: Plan, policy: HeadPolicy, prompt: bool) -> float:
    """The longest text in which every key stands where the text has it, if nothing was evicted by hand."""
    lap, retention, clamp = plan.lap, policy.retention, policy.positions.distance
    if lap is None:
        return math.inf
    if clamp is not None:  # from a local window on summaries are made, at angle 0
        reads = (policy.prefill, policy.decode)
        near = [s.local for s in reads if s is not None and s.scorer.summary is not None and s.scorer.summary.local]
        return min([clamp + 1, plan.sink + lap, *near])
    reach = retention.reach(prompt)
    if reach is None:
        return math.inf
    return plan.sink + lap if retention.sink == 0 else min(plan.sink + lap, retention.sink + reach)


def turning_points(plan: Plan) -> list[float]:
    """The lengths after which a decode call of the plan does something else than before, ascending."""
    policies = {group.policy for layer in plan.layers for group in layer.groups}
    points = {straight_to(plan, policy, False) for policy in policies}
    for selector in {policy.decode for policy in policies if policy.decode is not None}:
        points |= {selector.dense_below, reads_all_to(selector)}
    points |= {Pages.of(policy).most for policy in policies if policy.placement is not None}
    return sorted(points)
