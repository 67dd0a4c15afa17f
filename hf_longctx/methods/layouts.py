"""Plans from policies: one for all heads, or two split by a role; layers with a sliding window of their own keep it."""

from __future__ import annotations

from collections.abc import Sequence

from ..cache.positions import Absolute
from ..cache.retention import KeepAll, SinkWindow
from ..errors import UnsupportedError
from ..models import LayerFacts, ModelFacts
from ..plan import HeadGroup, HeadPolicy, LayerPlan, Plan, Positions

DENSE = HeadPolicy(KeepAll(), Absolute())


def uniform(method: str, facts: ModelFacts, policy: HeadPolicy) -> Plan:
    """One policy for every head of every layer with full attention."""
    return Plan(method, tuple(_own(layer, policy.positions) or _whole(layer, policy) for layer in facts.layers))


def split(
    method: str, facts: ModelFacts, retrieval: Sequence[Sequence[bool]], full: HeadPolicy, streaming: HeadPolicy
) -> Plan:
    """Policy `full` for the KV heads marked in `retrieval` `[L][Hkv]`, `streaming` for the others."""

    def layer(facts: LayerFacts, marks: Sequence[bool]) -> LayerPlan:
        groups = ((tuple(h for h, mark in enumerate(marks) if mark is role), p) for role, p in _ROLES(full, streaming))
        return _own(facts, full.positions) or LayerPlan(tuple(HeadGroup(heads, p) for heads, p in groups if heads))

    return Plan(method, tuple(layer(f, marks) for f, marks in zip(facts.layers, retrieval, strict=True)))


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


def _ROLES(full: HeadPolicy, streaming: HeadPolicy) -> tuple[tuple[bool, HeadPolicy], ...]:
    return (True, full), (False, streaming)


def _whole(layer: LayerFacts, policy: HeadPolicy) -> LayerPlan:
    return LayerPlan((HeadGroup(tuple(range(layer.kv_heads)), policy),))


def _own(layer: LayerFacts, positions: Positions) -> LayerPlan | None:
    """A layer's own sliding window, or None if it has full attention."""
    if layer.window is None:
        return None
    return _whole(layer, HeadPolicy(SinkWindow(0, layer.window), positions))
