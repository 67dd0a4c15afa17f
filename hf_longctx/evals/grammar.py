"""How methods and lengths are written on a command line: `dense,quest(token_budget=1024)` and `1k,2k,4096`, `1m`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from ..methods import make

_ENTRY = re.compile(r"""\s*([\w-]+)\s*(?:\(((?:'[^']*'|"[^"]*"|[^()'"])*)\))?\s*(,|$)""")
_KNOB = re.compile(r"""\s*(\w+)\s*=\s*('[^']*'|"[^"]*"|[^,'"]*?)\s*(,|$)""")
_WORDS = {"none": None, "true": True, "false": False}


@dataclass(frozen=True)
class Choice:
    """A method to measure.

    Attributes:
        name: in tables and result files.
        method: what `patch` is called with.
        knobs: and its knobs.
    """

    name: str
    method: str
    knobs: dict[str, Any] = field(default_factory=dict)


def methods(text: str) -> list[Choice]:
    """Methods with their knobs, as `name` or `name(knob=value, ...)`, with commas between.

    Values are integers, floats, `true`, `false`, `none`, or strings, which need quotes only where they hold a comma,
    a parenthesis or would be read as one of the others. A method may come twice with other knobs.

    Args:
        text: e.g. `dense,streaming_llm(sinks=4,window=508)`.

    Returns:
        A choice for each, whose name is the text written in one way: two names are equal where the choices are.

    Raises:
        ValueError: not of that form, a choice that comes twice, no such method or no such knob; names the nearest.
        TypeError: a value of another type than the knob takes.
    """
    chosen: list[Choice] = []
    at = 0
    while at < len(text) or not chosen:
        entry = _ENTRY.match(text, at)
        if entry is None or (entry[3] and not text[entry.end() :].strip()):
            raise ValueError(
                f"methods: expected name or name(knob=value, ...), with commas between; got '{text[at:].strip()}'."
            )
        name = entry[1].replace("-", "_").lower()
        knobs = _knobs(name, entry[2] or "")
        make(name, knobs)
        shown = ",".join(f"{knob}={_shown(value)}" for knob, value in sorted(knobs.items()))
        choice = Choice(f"{name}({shown})" if knobs else name, name, knobs)
        if any(choice.name == other.name for other in chosen):
            raise ValueError(f"methods: expected every choice once; got '{choice.name}' twice.")
        chosen.append(choice)
        at = entry.end()
    return chosen


def _knobs(method: str, text: str) -> dict[str, Any]:
    """Knobs of one method, from what stands between its parentheses."""
    knobs: dict[str, Any] = {}
    at = 0
    while text[at:].strip():
        knob = _KNOB.match(text, at)
        if knob is None or not knob[2]:
            raise ValueError(f"methods: expected {method}(knob=value, ...); got '{text[at:].strip()}' in it.")
        if knob[1] in knobs:
            raise ValueError(f"methods: expected each knob of {method} once; got '{knob[1]}' twice.")
        knobs[knob[1]] = _value(knob[2])
        at = knob.end()
    return knobs


def _value(text: str) -> Any:
    """What a value says: quoted it is a string, whatever it holds."""
    if text[0] in "'\"":
        return text[1:-1]
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _shown(value: Any) -> str:
    """A value as it can be written, with quotes where it would be read as something else."""
    if isinstance(value, str) and (not value or re.search(r"[,()\s]", value) or not isinstance(_value(value), str)):
        return f'"{value}"' if "'" in value else f"'{value}'"
    return str(value)


def lengths(text: str) -> list[int]:
    """Lengths in tokens, with commas between; `1k` is 1024, `1m` 1024 times that.

    Raises:
        ValueError: something that is no positive length, or one that comes twice.
    """
    found = []
    for word in text.split(","):
        read = re.fullmatch(r"\s*(\d+)([km]?)\s*", word, re.IGNORECASE)
        if read is None or not int(read[1]):
            raise ValueError(f"lengths: expected tokens such as 1k,2k,4096; got '{word.strip()}'.")
        found.append(int(read[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[read[2].lower()])
    if len(set(found)) != len(found):
        raise ValueError(f"lengths: expected every length once; got '{text}'.")
    return found
