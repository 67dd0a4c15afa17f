"""Whether a plan is one for a model, and one to train with."""

from __future__ import annotations

from ..errors import UnsupportedError
from ..models import ModelFacts
from ..plan import HeadGroup, HeadPolicy, Plan

_CHOOSING = {"q_head": "query heads", "kv_head": "KV heads"}


def check_plan(plan: Plan, facts: ModelFacts, where: str = "patch") -> None:
    """Refuse a plan that is not for a model of these layers and heads.

    Raises:
        ValueError: names the first layer that differs.
        UnsupportedError: a zero sink, for a model with learned ones.
    """
    if plan.zero_sink and facts.has_sinks:
        raise UnsupportedError(
            f"{where}: expected a model without sinks in its softmax for zero_sink; got '{facts.family}', which has "
            "learned one for each head. Leave zero_sink out."
        )
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


def check_trainable(plan: Plan) -> None:
    """Refuse a plan that has no gradient, or whose choice a training call would never make.

    Raises:
        UnsupportedError: names the first layer with such heads, why, and what to train with.
    """
    for i, layer in enumerate(plan.layers):
        for group in layer.groups:
            reason = _untrainable(group.policy)
            if reason is not None:
                raise UnsupportedError(
                    f"patch: expected a method with a gradient for train=True; got '{plan.method}', which {reason} "
                    f"(layer {i}). Train with 'dense', 'streaming_llm', 'duo_attention' or 'xattention' and native "
                    "keys and values, and patch again to generate."
                )


def _untrainable(policy: HeadPolicy) -> str | None:
    """Why a policy cannot be trained with, as the end of a sentence, or None."""
    if policy.prefill is not None and policy.prefill.scorer.summary is not None:
        return "reads its keys and values back from memory, cut off from their gradient"
    if policy.decode is not None:
        return "chooses what decode steps read, of which training has none"
    if policy.kv is not None:
        return f"rounds keys and values to {policy.kv.bits} bits, which has no gradient"
    return None
