"""Plans from policies: one for all heads, or two split by a role; layers with a sliding window of their own keep it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..cache.positions import Absolute
from ..cache.retention import KeepAll, SinkWindow
from ..errors import UnsupportedError
from ..models import LayerFacts, ModelFacts
from ..plan import HeadGroup, HeadPolicy, KVFormat, LayerPlan, Plan, Selector
from ..select.budgets import Mass

DENSE = HeadPolicy(KeepAll(), Absolute())


def uniform(method: str, facts: ModelFacts, policy: HeadPolicy | Sequence[HeadPolicy]) -> Plan:
    """One policy for every head of every layer with full attention, or one for each layer `[L]`."""
    every = [(True,) * layer.kv_heads for layer in facts.layers]
    return split(method, facts, every, policy, DENSE)


def split(
    method: str,
    facts: ModelFacts,
    retrieval: Sequence[Sequence[bool]],
    full: HeadPolicy | Sequence[HeadPolicy],
    streaming: HeadPolicy,
) -> Plan:
    """Policy `full` (or one for each layer) for the KV heads marked in `retrieval` `[L][Hkv]`, else `streaming`."""
    policies = [full] * len(facts.layers) if isinstance(full, HeadPolicy) else full

    def layer(facts: LayerFacts, marks: Sequence[bool], full: HeadPolicy) -> LayerPlan:
        if facts.window is not None:
            return LayerPlan((HeadGroup(tuple(range(facts.kv_heads)), _own(facts.window, full)),))
        whole = HeadGroup(tuple(range(facts.kv_heads)), full)
        far, near = (tuple(h for h, mark in enumerate(marks) if mark is role) for role in (True, False))
        groups = (part(whole, far, facts.q_heads // facts.kv_heads), HeadGroup(near, streaming))
        return LayerPlan(tuple(group for group in groups if group.kv_heads))

    return Plan(method, tuple(map(layer, facts.layers, retrieval, policies)))


def part(group: HeadGroup, heads: tuple[int, ...], per_kv: int) -> HeadGroup:
    """Some heads of a group; where each has a threshold of its own, it keeps it.

    Args:
        group: the whole.
        heads: of those of the group.
        per_kv: query heads of a KV head.
    """

    def narrow(selector: Selector | None) -> Selector | None:
        if selector is None or not isinstance(selector.budget, Mass) or len(selector.budget.shares) == 1:
            return selector
        size = per_kv if selector.share == "q_head" else 1
        starts = [group.kv_heads.index(head) * size for head in heads]
        kept = tuple(selector.budget.shares[start + i] for start in starts for i in range(size))
        return dataclasses.replace(selector, budget=Mass(kept))

    policy = group.policy
    return HeadGroup(heads, dataclasses.replace(policy, prefill=narrow(policy.prefill), decode=narrow(policy.decode)))


def require_full_attention(method: str, facts: ModelFacts) -> None:
    """Refuse a model in which there is nothing to do.

    Raises:
        UnsupportedError: every layer has a sliding window already.
    """
    if all(layer.window is not None for layer in facts.layers):
        raise UnsupportedError(
            f"{method}: expected a layer with full attention; got '{facts.family}' with a sliding window of "
            f"{facts.layers[0].window} in all {len(facts.layers)} layers, which bounds memory already. Use it as it is."
        )


def require_small_positions(method: str, facts: ModelFacts, knobs: str, sizes: Sequence[int]) -> None:
    """Refuse a model whose positions do not stay right up to a size.

    Args:
        method: for the message.
        facts: of the model.
        knobs: what adds up to the size, such as `sinks + window`.
        sizes: their values; the last can be made smaller.

    Raises:
        UnsupportedError: positions are not rotary, or below that size frequencies change, or the scale of queries.
    """
    if facts.not_in_cache:
        raise UnsupportedError(
            f"{method}: expected positions that can be counted in the cache; got '{facts.family}': "
            f"{facts.not_in_cache}. Use 'dense' or 'duo_attention'."
        )
    longest, changes = facts.longest_in_cache, "rotary frequencies change"
    rope = getattr(facts.config, "rope_parameters", None) or {}
    if rope.get("llama_4_scaling_beta"):  # by the logarithm of how often a position has this many before it
        longest, changes = int(rope["original_max_position_embeddings"]), "queries are scaled"
    if longest is not None and sum(sizes) > longest:
        raise UnsupportedError(
            f"{method}: expected {knobs} <= {longest} for '{facts.family}', because its {changes} "
            f"beyond that length; got {' + '.join(map(str, sizes))}. "
            f"Use {knobs.split()[-1]}={longest - sum(sizes[:-1])} or less."
        )


def _own(window: int, policy: HeadPolicy) -> HeadPolicy:
    """What a layer with a sliding window of its own does beside others with a policy: far keys it never reads."""
    positions = policy.positions if policy.positions.in_cache else Absolute()
    return HeadPolicy(SinkWindow(0, window), positions, kv=own_format(policy.kv, window))


def own_format(kv: KVFormat | None, window: int | None) -> KVFormat | None:
    """How a layer stores keys and values: with a sliding window of its own, recent tokens like others."""
    if kv is None or window is None or not kv.recent:
        return kv
    made: Any = kv
    found: KVFormat = dataclasses.replace(made, recent=0)
    return found
