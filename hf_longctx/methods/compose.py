"""One plan out of several methods: what a prompt reads from one, what a decode step reads from another, and so on."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from ..cache.positions import Absolute, InCache
from ..models import ModelFacts
from ..plan import HeadGroup, HeadPolicy, KVFormat, LayerPlan, Placement, Plan
from .duo_heads import DuoHeads
from .fit import check_plan
from .kv import kv_format
from .layouts import DENSE, own_format, part, require_full_attention, require_small_positions, uniform
from .method import Method


def compose(
    facts: ModelFacts,
    prefill: Method | Plan | None = None,
    decode: Method | Plan | None = None,
    heads: DuoHeads | None = None,
    kv: str | KVFormat | None = None,
    placement: Placement | None = None,
) -> Plan:
    """The plan that does all of it, head by head; what does not fit is refused by name (`plan/rules.py`).

    Args:
        facts: of the model.
        prefill: by whose choice prompts are read; None: by that of `decode`.
        decode: by whose choice decode steps are read; None: by that of `prefill`.
        heads: heads that stream instead, whatever the methods choose.
        kv: how keys and values are stored, in place of what the methods say; None: as they say.
        placement: where heads that select in decode steps are stored, in place of what the methods say; those then
            select from the first step on.

    A zero sink of one plan holds for the whole: a model has one softmax.

    Raises:
        ValueError: nothing to compose, or values that do not fit; names them.
        UnsupportedError: this model cannot do that, and why.
    """
    if all(value is None for value in (prefill, decode, heads, kv, placement)):
        raise ValueError("compose: expected a method or a value of an axis; got none. Give for example kv='int4'.")
    stored = kv_format(kv, "compose")
    first, last = (None if m is None else _plan(m, facts) for m in (prefill, decode))
    names = list(dict.fromkeys(plan.method for plan in (first, last) if plan is not None))
    names += [_name(value) for value in (heads, stored, placement) if value is not None]
    name = " + ".join(names) or "dense"
    whole = first or last or uniform("dense", facts, DENSE)
    both = [first or whole, last or whole]
    if kv is not None:
        both = [_stored(plan, facts, stored) for plan in both]
    plan = _merged(name, facts, *both)
    if heads is not None:
        plan = _split(plan, facts, heads)
    if placement is not None:
        plan = _placed(plan, placement)
    return replace(plan, zero_sink=any(given.zero_sink for given in (first, last) if given is not None))


def _plan(method: Method | Plan, facts: ModelFacts) -> Plan:
    """A method's plan for a model, or a ready one that fits it."""
    plan = method if isinstance(method, Plan) else method.plan(facts)
    check_plan(plan, facts, "compose")
    return plan


def _name(value: object) -> str:
    """`DuoHeads` as `duo_heads`, `Int4KV` as `int4`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(value).__name__.removesuffix("KV")).lower()


def _stored(plan: Plan, facts: ModelFacts, kv: KVFormat | None) -> Plan:
    """Keys and values in a format; in a layer with a sliding window of its own, those of recent tokens, too."""
    layers = [
        LayerPlan(tuple(replace(g, policy=replace(g.policy, kv=own_format(kv, layer.window))) for g in stack.groups))
        for stack, layer in zip(plan.layers, facts.layers, strict=True)
    ]
    return Plan(plan.method, tuple(layers))


def _each(plan: Plan, change: Callable[[HeadPolicy], HeadPolicy]) -> Plan:
    layers = (tuple(replace(g, policy=change(g.policy)) for g in layer.groups) for layer in plan.layers)
    return Plan(plan.method, tuple(map(LayerPlan, layers)))


# methods --------------------------------------------------------------------------------------------------------------


def _merged(name: str, facts: ModelFacts, prefill: Plan, decode: Plan) -> Plan:
    """The prefill selectors of one plan with the decode selectors of the other, on the heads that both name."""
    layers = []
    for i, (ours, theirs) in enumerate(zip(prefill.layers, decode.layers, strict=True)):
        per_kv = facts.layers[i].q_heads // facts.layers[i].kv_heads
        groups = []
        for a in ours.groups:
            for b in theirs.groups:
                shared = tuple(head for head in a.kv_heads if head in b.kv_heads)
                if shared:
                    x, y = (part(group, shared, per_kv).policy for group in (a, b))
                    groups.append(HeadGroup(shared, _both(x, y, f"compose '{name}', layer {i}")))
        layers.append(groups)
    if any(_selects(group.policy) and group.policy.retention.window is None for groups in layers for group in groups):
        layers = [[_streams_whole(group) for group in groups] for groups in layers]
    return Plan(name, tuple(LayerPlan(tuple(groups)) for groups in layers))


def _both(prefill: HeadPolicy, decode: HeadPolicy, where: str) -> HeadPolicy:
    """One policy of two, for the same heads."""
    kept = [(p.retention, p.positions) for p in (prefill, decode)]
    chosen = [pair for pair in kept if pair != (DENSE.retention, DENSE.positions)] or kept
    formats = {p.kv for p in (prefill, decode) if p.kv is not None}
    for what, values in (("way to keep tokens", dict.fromkeys(chosen)), ("KV format", formats)):
        if len(values) > 1:
            said = " and ".join(f"'{p.describe()}'" for p in (prefill, decode))
            raise ValueError(f"{where}: expected one {what}; got {said}. Give both methods the same, or leave one out.")
    return HeadPolicy(*chosen[0], prefill.prefill, decode.decode, next(iter(formats), None), decode.placement)


def _selects(policy: HeadPolicy) -> bool:
    return policy.prefill is not None or policy.decode is not None


def _streams_whole(group: HeadGroup) -> HeadGroup:
    """Heads that one method lets stream have nothing to select in; beside them, others have."""
    if group.policy.retention.window is None:
        return group
    return replace(group, policy=replace(group.policy, prefill=None, decode=None, placement=None))


# heads and placement --------------------------------------------------------------------------------------------------


def _split(plan: Plan, facts: ModelFacts, heads: DuoHeads) -> Plan:
    """Let the heads with low gates stream; with small positions if others have, so that sinks stay in reach."""
    require_full_attention(plan.method, facts)
    retrieval, window = heads.find(facts, plan.method)
    positions = InCache() if plan.bounded else Absolute()
    layers = []
    for i, layer in enumerate(plan.layers):
        if facts.layers[i].window is not None:
            layers.append(layer)
            continue
        groups, near = [], [head for head, mark in enumerate(retrieval[i]) if not mark]
        for group in layer.groups:
            if group.policy.retention.window is not None:
                raise ValueError(
                    f"compose '{plan.method}', layer {i}: expected methods that leave heads= to choose who streams; "
                    f"got '{group.policy.describe()}'. Leave heads= out, or set that method's own pattern."
                )
            far = tuple(head for head in group.kv_heads if head not in near)
            if far:
                groups.append(part(group, far, facts.layers[i].q_heads // facts.layers[i].kv_heads))
        if near:
            groups.append(HeadGroup(tuple(near), HeadPolicy(window, positions, kv=layer.groups[0].policy.kv)))
        layers.append(LayerPlan(tuple(groups)))
    made = Plan(plan.method, tuple(layers))
    if made.lap is not None:
        require_small_positions(plan.method, facts, "sinks + local", (made.sink, made.lap))
    return made


def _placed(plan: Plan, placement: Placement) -> Plan:
    """Store there what decode steps read a part of; the rest is read at every step."""
    if all(group.policy.decode is None for layer in plan.layers for group in layer.groups):
        raise ValueError(
            f"compose '{plan.method}': expected a method that selects in decode steps beside '{placement.describe()}'; "
            "got none. Add decode=, such as Quest(), or leave placement= out."
        )

    def place(policy: HeadPolicy) -> HeadPolicy:
        if policy.decode is None:
            return policy
        # dense_below is where to choose gets faster on the device; elsewhere, to read everything is to bring it all in
        return replace(policy, decode=replace(policy.decode, dense_below=0), placement=placement)

    return _each(plan, place)
