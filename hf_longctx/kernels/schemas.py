"""The arguments of an operation as `torch.library` has them: flat, each with a name and a plain type.

An operation takes values (`types.py`) beside tensors. What a compiler is shown is made of the annotations of its
definition: a value becomes its fields one after the other, and a list of values a list of each field.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Protocol, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from . import experts, fill, linear, step
from . import types as values
from .step import Choice, GroupStep
from .types import Packed

_PLAIN: dict[Any, tuple[str, Any]] = {
    Tensor: ("Tensor", None),
    int: ("SymInt", 0),
    float: ("float", 0.0),
    bool: ("bool", False),
    str: ("str", ""),
    torch.dtype: ("ScalarType", None),
}
"""Plain types by those of Python, and what stands in the place of a value that is not there."""

_NAMES = {**vars(values), **vars(step), **vars(linear), **vars(fill), **vars(experts)}
"""Where the names in annotations are found."""

_ELSEWHERE = {(Choice, "summary")}
"""Fields that are no arguments, as what they hold is one already: a compiler must not see one tensor as two."""


class Part(Protocol):
    """An argument, or a field of one."""

    @property
    def names(self) -> list[tuple[str, str, bool]]:
        """Name, plain type, and whether it is changed, of each flat argument."""

    def take(self, x: Any) -> list[Any]:
        """The flat arguments of a value; this much is traced."""

    def build(self, flat: Iterator[Any]) -> Any:
        """The value of flat arguments, which are taken from `flat`."""


@dataclass(frozen=True)
class Plain:
    """One flat argument; `as_tuple`: a list that was a tuple."""

    name: str
    kind: str
    changed: bool
    as_tuple: bool = False

    @property
    def names(self) -> list[tuple[str, str, bool]]:
        """As `Part.names`, like the other two."""
        return [(self.name, self.kind, self.changed)]

    def take(self, x: Any) -> list[Any]:
        """Itself."""
        return [list(x)] if self.kind.endswith("]") else [x]

    def build(self, flat: Iterator[Any]) -> Any:
        """Itself."""
        x = next(flat)
        return tuple(x) if self.as_tuple else x


@dataclass(frozen=True)
class Stored:
    """Keys or values, `Tensor | Packed`; `bits` is 0 where they are a tensor."""

    name: str
    changed: bool

    @property
    def names(self) -> list[tuple[str, str, bool]]:
        """As `Part.names`, like the other two."""
        beside = [(f"{self.name}_{part}", "Tensor?", self.changed) for part in ("scale", "zero")]
        form = [(f"{self.name}_bits", "SymInt", False), (f"{self.name}_dtype", "ScalarType?", False)]
        return [(self.name, "Tensor", self.changed), *beside, *form]

    def take(self, x: Any) -> list[Any]:
        """Payload, scale, zero, bits, dtype."""
        return [x.payload, x.scale, x.zero, x.bits, x.dtype] if isinstance(x, Packed) else [x, None, None, 0, None]

    def build(self, flat: Iterator[Any]) -> Any:
        """Either of the two."""
        x, scale, zero, bits, dtype = (next(flat) for _ in range(5))
        return x if bits == 0 else Packed(x, scale, zero, bits, dtype)


@dataclass(frozen=True)
class Slots:
    """`Tensor | int`: of the two the other is None, or 0."""

    name: str

    @property
    def names(self) -> list[tuple[str, str, bool]]:
        """As `Part.names`, like the other two."""
        return [(self.name, "Tensor?", False), (f"{self.name}_first", "SymInt", False)]

    def take(self, x: Any) -> list[Any]:
        """Tensor, number."""
        return [x, 0] if isinstance(x, Tensor) else [None, x]

    def build(self, flat: Iterator[Any]) -> Any:
        """Either of the two."""
        x, first = next(flat), next(flat)
        return first if x is None else x


@dataclass(frozen=True)
class Value:
    """A value by its fields; an optional one says first whether it is there."""

    name: str
    make: Callable[..., Any]
    parts: tuple[tuple[str, Part], ...]
    optional: bool

    @property
    def names(self) -> list[tuple[str, str, bool]]:
        """As `Part.names`, like the other two."""
        inner = [name for _, part in self.parts for name in part.names]
        if not self.optional:
            return inner
        absent = [(name, "Tensor?" if kind == "Tensor" else kind, changed) for name, kind, changed in inner]
        return [(self.name, "bool", False), *absent]

    def take(self, x: Any) -> list[Any]:
        """Its fields."""
        if x is None:
            return [False, *(blank(kind) for _, kind, _ in self.names[1:])]
        flat = [True] if self.optional else []
        for field, part in self.parts:
            flat += part.take(getattr(x, field))
        return flat

    def build(self, flat: Iterator[Any]) -> Any:
        """Itself, or None."""
        there = next(flat) if self.optional else True
        made = {field: part.build(flat) for field, part in self.parts}
        return self.make(**made) if there else None


@dataclass(frozen=True)
class Many:
    """A sequence of values: a list of each flat argument.

    torch changes no list with a None in it, so `[0]` stands for that, and makes numbers of dtypes, so they are named.
    """

    each: Value

    @property
    def names(self) -> list[tuple[str, str, bool]]:
        """As `Part.names`, like the other two."""
        kinds = {"Tensor?": "Tensor", "ScalarType?": "str"}
        return [
            (name, f"{kinds.get(kind, kind) if changed or kind == 'ScalarType?' else kind}[]", changed)
            for name, kind, changed in self.each.names
        ]

    def take(self, x: Any) -> list[Any]:
        """Lists."""
        columns, rows = [], [self.each.take(one) for one in x]
        for i, (_, kind, changed) in enumerate(self.each.names):
            column = [row[i] for row in rows]
            if changed:
                column = [torch.empty(0) if y is None else y for y in column]
            elif kind == "ScalarType?":
                column = ["" if y is None else str(y) for y in column]
            columns.append(column)
        return columns

    def build(self, flat: Iterator[Any]) -> Any:
        """The sequence."""
        columns = []
        for _, kind, changed in self.each.names:
            column = next(flat)
            if changed:
                column = [None if y.ndim == 1 else y for y in column]
            elif kind == "ScalarType?":
                column = [getattr(torch, y.removeprefix("torch.")) if y else None for y in column]
            columns.append(column)
        return [self.each.build(iter(row)) for row in zip(*columns, strict=True)]


def blank(kind: str) -> Any:
    """What stands in the place of a flat argument of a value that is not there."""
    if kind.endswith("]"):
        return []
    return next((empty for plain, empty in _PLAIN.values() if plain == kind), None)


def parts_of(definition: Callable[..., Any], changed: frozenset[str]) -> tuple[Part, ...]:
    """The arguments of an operation.

    Args:
        definition: a function with its arguments, annotated.
        changed: what is changed in place: names of arguments, or of fields, as `groups.k`.
    """
    hints = get_type_hints(definition, localns=_NAMES)
    return tuple(_part(name, hint, changed) for name, hint in hints.items() if name != "return")


def schema(parts: Sequence[Part], returns: str) -> str:
    """What `torch.library` parses: `(Tensor x, Tensor(a0!) out) -> Tensor`, and so on."""
    said = []
    for number, (name, kind, changed) in enumerate(name for part in parts for name in part.names):
        marked = kind.replace("Tensor", f"Tensor(a{number}!)", 1) if changed else kind
        said.append(f"{marked} {name}")
    return f"({', '.join(said)}) -> {returns}"


def _part(path: str, hint: Any, changed: frozenset[str]) -> Part:
    name, touched = path.replace(".", "_"), path in changed
    options = [x for x in get_args(hint) if x is not type(None)]
    if get_origin(hint) in (Union, types.UnionType):
        if Packed in options:
            return Stored(name, touched)
        if options == [Tensor, int]:
            return Slots(name)
        (only,) = options
        inner = _part(path, only, changed)
        return replace(inner, optional=True) if isinstance(inner, Value) else _maybe(inner)
    if hint is Packed:
        return Stored(name, touched)
    if is_dataclass(hint):
        assert isinstance(hint, type)
        own = get_type_hints(hint, localns=_NAMES)
        names = [field.name for field in fields(hint) if (hint, field.name) not in _ELSEWHERE]
        below = tuple((field, _part(f"{path}.{field}", own[field], changed)) for field in names)
        return Value(name, _MADE_BY.get(hint, hint), below, False)
    if options:
        as_tuple = get_origin(hint) is tuple
        each = _part(path, options[0], changed)
        if isinstance(each, Value):
            return Many(each)
        assert isinstance(each, Plain)
        return replace(each, kind=f"{each.kind}[]", as_tuple=as_tuple)
    return Plain(name, _PLAIN[hint][0], touched)


def _choice(**known: Any) -> Callable[[Any], Choice]:
    return lambda summary: Choice(summary, **known)


def _group(choice: Callable[[Any], Choice] | None, bounds: Any, **known: Any) -> GroupStep:
    """A group that chooses by the bounds that it keeps."""
    return GroupStep(bounds=bounds, choice=None if choice is None else choice(bounds), **known)


_MADE_BY: dict[Any, Callable[..., Any]] = {Choice: _choice, GroupStep: _group}


def _maybe(part: Part) -> Part:
    assert isinstance(part, Plain)
    return replace(part, kind=f"{part.kind}?")
