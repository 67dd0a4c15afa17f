"""What fits together in one policy. Each rule says what does not, as the end of an error message, or None."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import HeadPolicy


def misfit(policy: HeadPolicy, bounded: bool, at_read: bool) -> str | None:
    """The first rule that a policy breaks, as the end of an error message, or None.

    Args:
        policy: what a group of heads does.
        bounded: some head of the plan has small positions, so this one must be readable at them.
        at_read: some head of the plan has keys stored un-rotated, as the model then gives them to all.
    """
    found = (rule(policy) for rule in _RULES)
    said = next((s for s in found if s is not None), None)
    if said is None and at_read:
        return _rotated_at_read(policy)
    return said if said is not None or not bounded else _readable_at_small_positions(policy)


def _rotated_at_read(policy: HeadPolicy) -> str | None:
    """A selector scores stored keys, and a format rounds them, as they are read."""
    plain = policy.prefill is None and policy.decode is None and policy.kv is None and policy.placement is None
    if policy.positions.at_read and plain and policy.retention.window is None:
        return None
    return (
        f"expected heads that store native keys un-rotated and read them all, as others of the plan do; got "
        f"'{policy.describe()}'. Give every head the same positions, and no selector, format, placement or window."
    )


def _readable_at_small_positions(policy: HeadPolicy) -> str | None:
    """A bare window has the same distances in text and cache; sinks and far keys have not."""
    retention, positions = policy.retention, policy.positions
    if positions.distance is not None:
        return None
    if retention.window is not None and (positions.in_cache or not retention.sink):
        return None
    return (
        "expected a window on every head, and its sinks counted in the cache, because some positions are; got "
        f"'{policy.describe()}'. Use SinkWindow with InCache there, or Absolute positions everywhere."
    )


def _clamped_heads_keep_all(policy: HeadPolicy) -> str | None:
    if policy.positions.distance is None or policy.retention.window is None:
        return None
    return (
        f"expected heads with clamped positions to keep everything; got '{policy.retention.describe()}'. "
        "Use InCache positions with a window."
    )


def _selecting_heads_keep_all(policy: HeadPolicy) -> str | None:
    if policy.retention.window is None or (policy.prefill is None and policy.decode is None):
        return None
    return (
        f"expected heads that select blocks to keep everything; got '{policy.retention.describe()}'. "
        "Leave the selector out: a window is read whole."
    )


def _scorers_stand_where_they_can(policy: HeadPolicy) -> str | None:
    turned = policy.positions.in_cache or policy.positions.distance is not None
    for phase, selector in (("prefill", policy.prefill), ("decode", policy.decode)):
        if selector is None:
            continue
        scorer = selector.scorer
        if phase not in scorer.phases:
            return (
                f"expected a scorer for {phase}; got {type(scorer).__name__}, which works in "
                f"{' and '.join(scorer.phases)}. Use another one there."
            )
        if turned and not scorer.clamped:
            return (
                f"expected keys at their places in the text for {type(scorer).__name__}; got "
                f"'{policy.positions.describe()}'. Use Absolute positions, or RepresentativeDot."
            )
    return None


def _budgets_fit_their_scorers(policy: HeadPolicy) -> str | None:
    for selector in (policy.prefill, policy.decode):
        if selector is None:
            continue
        tokens, block = selector.budget.tokens, selector.block
        if tokens is None and not selector.scorer.is_mass:
            return (
                f"expected a fixed budget for {type(selector.scorer).__name__}, whose scores are no shares of "
                f"attention; got {selector.budget.describe()}. Use TopK."
            )
        if tokens is not None and (tokens % block or tokens < block):
            return (
                f"expected a budget in whole blocks of {block} tokens, at least one; got {tokens}. "
                f"Give {max(block, tokens // block * block)}."
            )
    return None


def _attention_is_counted_per_kv_head(policy: HeadPolicy) -> str | None:
    for selector in (policy.prefill, policy.decode):
        summary = None if selector is None else selector.scorer.summary
        if selector is not None and summary is not None and summary.weighs and selector.share == "q_head":
            return (
                f"expected {summary.describe()} to be shared by the query heads of a KV head; got share='q_head'. "
                "Use 'kv_head' or 'all'."
            )
    return None


def _one_summary(policy: HeadPolicy) -> str | None:
    both = [s.scorer.summary for s in (policy.prefill, policy.decode) if s is not None and s.scorer.summary is not None]
    if len(set(both)) > 1:
        return (
            f"expected one kind of summary for prefill and decode; got {' and '.join(s.describe() for s in both)}. "
            "Use the same one."
        )
    if both and both[0].local and policy.prefill != policy.decode:
        return (
            f"expected the same selector in prefill and decode for {both[0].describe()}, which are found while the "
            "text is read; got two. Use one for both."
        )
    return None


def _offloaded_heads_select(policy: HeadPolicy) -> str | None:
    if policy.placement is None:
        return None
    selector = policy.decode
    if selector is None or selector.budget.tokens is None or selector.share == "q_head":
        return (
            f"expected a decode selector with a fixed budget per KV head for '{policy.placement.describe()}', so that "
            "a step reads a known number of blocks; got "
            f"{'none' if selector is None else selector.describe()}. Use one, or keep the cache on the device."
        )
    if selector.dense_below:
        return (
            f"expected dense_below=0 for '{policy.placement.describe()}', as to read everything is to bring it all in; "
            f"got {selector.dense_below}. Leave it out, or keep the cache on the device."
        )
    return None


def _recent_tokens_are_among_all(policy: HeadPolicy) -> str | None:
    if policy.kv is None or not policy.kv.recent:
        return None
    moved = policy.positions.in_cache or policy.positions.distance is not None or policy.positions.at_read
    if policy.retention.window is None and policy.prefill is None and policy.decode is None and not moved:
        return None
    return (
        "expected heads that keep all tokens, at their places in the text, and read them all, where recent ones are "
        f"held as they are; got '{policy.describe()}'. Use recent=0."
    )


_RULES: tuple[Callable[[HeadPolicy], str | None], ...] = (
    _clamped_heads_keep_all,
    _selecting_heads_keep_all,
    _scorers_stand_where_they_can,
    _budgets_fit_their_scorers,
    _one_summary,
    _attention_is_counted_per_kv_head,
    _offloaded_heads_select,
    _recent_tokens_are_among_all,
)
