"""What each KV head does, as frozen values: `Plan` > `LayerPlan` > `HeadGroup` > `HeadPolicy`. No tensors here.

Shape letters, used in every docstring of the package: `B` batch rows, `T` query tokens of this call, `S` stored tokens,
`Hq`/`Hkv` query and KV heads, `G = Hq // Hkv`, `D` head dim, `L` layers. A bare size is in tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol, TypeVar

_PRIMITIVES: dict[str, type] = {}
_T = TypeVar("_T", bound=type)


def primitive(cls: _T) -> _T:
    """Make a frozen dataclass known by its name, so that a plan that holds it survives a JSON round trip."""
    _PRIMITIVES[cls.__name__] = cls
    return cls


class Retention(Protocol):
    """What stays stored, and therefore what a query may see."""

    @property
    def sink(self) -> int:
        """First tokens of each row that are never evicted."""

    @property
    def window(self) -> int | None:
        """Last tokens that stay, the newest included; None keeps all."""

    def reach(self, tokens: int) -> int | None:
        """The window that a query sees in a call of `tokens` tokens; None is unbounded."""

    def describe(self) -> str:
        """One phrase for a table."""


class Positions(Protocol):
    """At which position a stored key is read."""

    @property
    def in_cache(self) -> bool:
        """True: distance is counted over what is stored; False: over the text."""

    def describe(self) -> str:
        """One phrase for a table."""


@dataclass(frozen=True)
class HeadPolicy:
    """Everything that one group of heads does."""

    retention: Retention
    positions: Positions

    def describe(self) -> str:
        """One phrase for a table."""
        return f"{self.retention.describe()}, {self.positions.describe()}"


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

    Raises:
        ValueError: no layers, or in-cache positions together with heads that keep everything or read sinks elsewhere.
    """

    method: str
    layers: tuple[LayerPlan, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("Plan: expected at least one layer; got none. List one LayerPlan per attention layer.")
        misfit = next(((i, p) for i, p in self._policies() if not _fits_in_cache(p)), None)
        if self.in_cache and misfit is not None:
            raise ValueError(
                f"Plan '{self.method}': expected a window on every head, and its sinks counted in the cache, because "
                f"some positions are; got '{misfit[1].describe()}' in layer {misfit[0]}. Use SinkWindow with InCache "
                "there, or Absolute positions everywhere."
            )

    def _policies(self) -> list[tuple[int, HeadPolicy]]:
        return [(i, group.policy) for i, layer in enumerate(self.layers) for group in layer.groups]

    @property
    def in_cache(self) -> bool:
        """True if any head counts its positions in the cache."""
        return any(policy.positions.in_cache for _, policy in self._policies())

    @property
    def sink(self) -> int:
        """The most sinks of any head."""
        return max(policy.retention.sink for _, policy in self._policies())

    @property
    def lap(self) -> int | None:
        """Period of the positions that keys are rotated at when some are in the cache (`cache/positions.py`)."""
        if not self.in_cache:
            return None
        return max(max(p.retention.window or 1, p.retention.reach(2) or 1) for _, p in self._policies())

    def describe(self) -> str:
        """A short text: one line per run of equal layers and head group."""
        lines = [f"{self.method}: {len(self.layers)} attention layers"]
        for layer, run in groupby(enumerate(self.layers), key=lambda pair: pair[1]):
            ids = [i for i, _ in run]
            for group in layer.groups:
                lines.append(f"  {_span('layer', ids)}, {_span('KV head', group.kv_heads)}: {group.policy.describe()}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """The plan as JSON text; `from_json` gives back an equal plan."""
        layers = [
            [
                {"kv_heads": list(g.kv_heads), **{f.name: _pack(getattr(g.policy, f.name)) for f in _POLICY_FIELDS}}
                for g in layer.groups
            ]
            for layer in self.layers
        ]
        return json.dumps({"method": self.method, "layers": layers})

    @staticmethod
    def from_json(text: str) -> Plan:
        """The plan that `to_json` wrote.

        Raises:
            ValueError: not such a text; says which layer and what is wrong.
        """
        try:
            raw = json.loads(text)
            layers = tuple(LayerPlan(tuple(map(_unpack_group, groups))) for groups in raw["layers"])
            return Plan(str(raw["method"]), layers)
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"Plan.from_json: expected the text of Plan.to_json; got {error!r} while reading it. "
                "Write the plan again with to_json."
            ) from error


_POLICY_FIELDS = dataclasses.fields(HeadPolicy)


def _fits_in_cache(policy: HeadPolicy) -> bool:
    """True if a head can be read at small positions; a bare window has the same distances in text and cache."""
    return policy.retention.window is not None and (policy.positions.in_cache or not policy.retention.sink)


def _pack(value: Any) -> dict[str, Any]:
    return {"kind": type(value).__name__, **dataclasses.asdict(value)}


def _unpack_group(raw: Mapping[str, Any]) -> HeadGroup:
    parts: dict[str, Any] = {}
    for field in _POLICY_FIELDS:
        values = dict(raw[field.name])
        kind = values.pop("kind")
        if kind not in _PRIMITIVES:
            raise ValueError(
                f"Plan.from_json: expected a {field.name} among {sorted(_PRIMITIVES)}; got '{kind}'. "
                "Import the module that defines it first."
            )
        parts[field.name] = _PRIMITIVES[kind](**values)
    return HeadGroup(tuple(int(h) for h in raw["kv_heads"]), HeadPolicy(**parts))


def _span(word: str, ids: Sequence[int]) -> str:
    runs: list[str] = []
    for _, run in groupby(enumerate(ids), key=lambda pair: pair[1] - pair[0]):
        members = [i for _, i in run]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return f"{word}{'s' if len(ids) > 1 else ''} {', '.join(runs)}"
