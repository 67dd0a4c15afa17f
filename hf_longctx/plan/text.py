"""Values of a plan as JSON, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .axes import PRIMITIVES


def pack(value: Any) -> Any:
    """A value of a plan as JSON: primitives carry their kind."""
    if not dataclasses.is_dataclass(value):
        return list(value) if isinstance(value, tuple) else value
    kind = {"kind": type(value).__name__} if type(value).__name__ in PRIMITIVES else {}
    inner = {field.name: pack(getattr(value, field.name)) for field in dataclasses.fields(value)}
    policy = inner.pop("policy", None)  # a group's policy lies open beside its heads
    return {**kind, **inner, **(policy or {})}


def unpack(raw: Any) -> Any:
    if isinstance(raw, list):
        return tuple(raw)
    if not isinstance(raw, Mapping):
        return raw
    values = dict(raw)
    kind = values.pop("kind")
    if kind not in PRIMITIVES:
        raise ValueError(
            f"Plan.from_json: expected a primitive among {sorted(PRIMITIVES)}; got '{kind}'. "
            "Import the module that defines it first."
        )
    return PRIMITIVES[kind](**{name: unpack(value) for name, value in values.items()})
