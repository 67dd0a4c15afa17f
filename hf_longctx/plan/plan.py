"""What each KV head does, as frozen values: `Plan` > `LayerPlan` > `HeadGroup` > `HeadPolicy`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from .axes import KVFormat, Placement, Positions, Retention, Summary
from .rules import misfit
from .selector import Selector
from .text import pack, unpack


@dataclass(frozen=True)
class HeadPolicy:
    """Everything that one group of heads does.

    Args:
        retention: what stays stored.
        positions: at which position a stored key is read.
        prefill: which blocks the queries of a prompt read; None: all that are stored.
        decode: which blocks the queries of a decode step read; None: all that are stored.
        kv: how keys and values are stored; None: as the model makes them.
        placement: where; None: on the device.
    """

    retention: Retention
    positions: Positions
    prefill: Selector | None = None
    decode: Selector | None = None
    kv: KVFormat | None = None
    placement: Placement | None = None

    def describe(self) -> str:
        """One phrase for a table."""
        parts = [self.retention.describe(), self.positions.describe()]
        if self.prefill is not None and self.prefill == self.decode:
            parts.append(f"reads {self.prefill.describe()}")
        else:
            parts += [
                f"{phase} reads {selector.describe()}"
                for phase, selector in (("prefill", self.prefill), ("decode", self.decode))
                if selector is not None
            ]
        parts += [part.describe() for part in (self.kv, self.placement) if part is not None]
        return ", ".join(parts)

    @property
    def summary(self) -> Summary | None:
        """What is kept beside each block for the selectors."""
        found = (s.scorer.summary for s in (self.decode, self.prefill) if s is not None)
        return next((summary for summary in found if summary is not None), None)


@dataclass(frozen=True)
class HeadGroup:
    """The KV heads of one layer that share a policy."""

    kv_heads: tuple[int, ...]
    policy: HeadPolicy


@dataclass(frozen=True)
class LayerPlan:
    """A partition of the layer's KV heads 0..Hkv-1 into groups."""

    groups: tuple[HeadGroup, ...]

    def __post_init__(self) -> None:
        heads = sorted(h for group in self.groups for h in group.kv_heads)
        if not heads or heads != list(range(len(heads))) or any(not g.kv_heads for g in self.groups):
            raise ValueError(
                f"LayerPlan: expected non-empty groups that name every KV head 0..Hkv-1 once; got {heads}. "
                "Give each head to exactly one group."
            )

    @property
    def kv_heads(self) -> int:
        """KV heads of the layer."""
        return sum(len(group.kv_heads) for group in self.groups)


@dataclass(frozen=True)
class Plan:
    """One policy per KV head of every attention layer.

    Args:
        method: its name, for tables and messages.
        layers: one for each attention layer.
        why: how it was chosen, if nobody asked for just this.
        zero_sink: every softmax has 1 added to its denominator, as if there were one more key with logit 0 and value 0
            (StreamingLLM, arXiv:2309.17453, §3.3).

    Raises:
        ValueError: no layers, in-cache positions together with heads that keep everything or read sinks elsewhere, or
            keys that are rotated at read beside keys that are not.
    """

    method: str
    layers: tuple[LayerPlan, ...]
    why: str = ""
    zero_sink: bool = False

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("Plan: expected at least one layer; got none. List one LayerPlan per attention layer.")
        for i, layer in enumerate(self.layers):
            for group in layer.groups:
                problem = misfit(group.policy, self.bounded, self.at_read)
                if problem is not None:
                    raise ValueError(f"Plan '{self.method}', layer {i}, {_span('KV head', group.kv_heads)}: {problem}")

    @cached_property
    def _policies(self) -> list[HeadPolicy]:
        return [group.policy for layer in self.layers for group in layer.groups]

    @cached_property
    def bounded(self) -> bool:
        """True if positions stay small however long the text: some head counts them in the cache, or clamps them."""
        return any(p.positions.in_cache or p.positions.distance is not None for p in self._policies)

    @cached_property
    def at_read(self) -> bool:
        """True if keys are stored un-rotated."""
        return any(policy.positions.at_read for policy in self._policies)

    @cached_property
    def looks(self) -> bool:
        """True if some head's result depends on how keys are rotated, and not on distances alone."""
        return any(p.prefill or p.decode or p.kv for p in self._policies)

    @cached_property
    def sink(self) -> int:
        """The most sinks of any head."""
        return max(policy.retention.sink for policy in self._policies)

    @cached_property
    def lap(self) -> int | None:
        """Period of the positions that keys are rotated at when positions stay small (`cache/positions.py`)."""
        if not self.bounded:
            return None
        near = [(p.positions.distance or 0) + 1 for p in self._policies]
        return max(near + [max(p.retention.window or 1, p.retention.reach(True) or 1) for p in self._policies])

    def describe(self) -> str:
        """A short text: one line per run of equal layers and head group."""
        lines = [f"{self.method}: {len(self.layers)} attention layers"]
        lines += [f"  {self.why}"] if self.why else []
        lines += ["  1 added to the denominator of every softmax"] if self.zero_sink else []
        for layer, run in groupby(enumerate(self.layers), key=lambda pair: pair[1]):
            ids = [i for i, _ in run]
            for group in layer.groups:
                lines.append(f"  {_span('layer', ids)}, {_span('KV head', group.kv_heads)}: {group.policy.describe()}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives back an equal plan."""
        layers = [[pack(group) for group in layer.groups] for layer in self.layers]
        return json.dumps({"method": self.method, "why": self.why, "zero_sink": self.zero_sink, "layers": layers})

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: not such a text; says which layer and what is wrong.
        """
        try:
            raw = json.loads(text)
            layers = tuple(LayerPlan(tuple(map(_unpack_group, groups))) for groups in raw["layers"])
            return Plan(str(raw["method"]), layers, str(raw.get("why", "")), bool(raw.get("zero_sink")))
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"Plan.from_json: expected the text of Plan.to_json; got {error!r} while reading it. "
                "Write the plan again with to_json."
            ) from error


def _unpack_group(raw: Mapping[str, Any]) -> HeadGroup:
    parts = {f.name: unpack(raw[f.name]) for f in dataclasses.fields(HeadPolicy) if f.name in raw}
    return HeadGroup(tuple(int(h) for h in raw["kv_heads"]), HeadPolicy(**parts))


def _span(word: str, ids: Sequence[int]) -> str:
    runs: list[str] = []
    for _, run in groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0]):
        members = [i for _, i in run]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return f"{word}{'s' if len(ids) > 1 else ''} {', '.join(runs)}"
