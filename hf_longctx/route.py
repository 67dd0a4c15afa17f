"""Which way a group of heads goes in a call: all is read, blocks are chosen, or one block of queries after another."""

from __future__ import annotations

import torch

from .cache.step import FEW, Step
from .context import Forward
from .limits import reads_all_to
from .plan import HeadPolicy, Selector
from .sight import turns_of


def leaves(forward: Forward, policy: HeadPolicy, step: Step) -> bool:
    """True if queries of the call may stay among those of other heads: nothing reorders, turns or watches them."""
    if step.order is not None or forward.tap is not None or policy.positions.at_read or torch.is_grad_enabled():
        return False
    selector = None if step.decodes else selector_for(policy.prefill, step)
    reads = selector is None or (reads_all(selector, step) and not goes_in_turn(policy, selector, step))
    return reads and step.tokens > FEW and not (policy.kv is not None and policy.kv.recent)


def selector_for(selector: Selector | None, step: Step) -> Selector | None:
    """The selector as far as it concerns the call."""
    if selector is None or not selector.dense_below or step.ragged or step.columns < selector.dense_below:
        return selector
    return selector.beyond


def goes_in_turn(policy: HeadPolicy, selector: Selector, step: Step) -> bool:
    """True if a block of queries must be read before the next can choose, or before its blocks can be brought in."""
    summary = selector.scorer.summary
    if summary is not None and summary.local:
        return True
    return step.decodes and (selector.refresh_every > 1 or (policy.placement is not None and step.tokens > 1))


def reads_all(selector: Selector, step: Step) -> bool:
    """True if no query of the call leaves a block out, as its number alone says."""
    return step.end <= reads_all_to(selector)


def reads_at_once(forward: Forward, layer: int, policy: HeadPolicy, selector: Selector | None, step: Step) -> bool:
    """True for a call of heads that go in turn, but see no block leave the local window: nothing waits for anything.

    Nobody asks then how much attention keys got, every key stands where the text has it, and none is read in two
    formats.
    """
    if selector is None or step.decodes or step.end > selector.local:
        return False
    summary, kv = selector.scorer.summary, policy.kv
    if summary is None or summary.weighs or (kv is not None and kv.recent):
        return False
    return turns_of(forward, layer, policy, step, None) is None
