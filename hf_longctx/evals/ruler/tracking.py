"""Variable tracking: a chain of assignments, spread over noise, followed to its end."""

from __future__ import annotations

import string
from random import Random

from .source import Prompt, Source, Task, assemble

_HOPS = 4
_TRACK = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_TRACKED = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {count} variables are assigned the value {value}, they are:"
)


def _tracking(task: str, source: Source, length: int, seed: int) -> Prompt:
    """A chain `VAR A = 12345`, `VAR B = VAR A`, ... in noise, after a short solved one; all its names are asked for."""
    draw = Random(seed)
    drawn = list(dict.fromkeys("".join(draw.choices(string.ascii_uppercase, k=5)) for _ in range(99)))
    first, names = drawn[: _HOPS + 1], drawn[_HOPS + 1 : 2 * _HOPS + 2]
    needles, tail = _chain(source, first, draw)
    shot, _ = source.noise.hide(needles, 60, 0)
    solved = source.ids(_TRACK) + shot + tail + source.ids(f" {' '.join(first)}\n\n\n")
    needles, tail = _chain(source, names, draw)
    head = source.opening + solved + source.ids(_TRACK)
    ids, spans = assemble(task, source.noise, 0, length, needles, head, tail)
    return Prompt(ids, tuple(names), spans)


def _chain(source: Source, names: list[str], draw: Random) -> tuple[list[tuple[float, list[int]]], list[int]]:
    """Assignments at ascending depths, and the question."""
    value = draw.randint(10_000, 99_999)
    values = [str(value), *(f"VAR {name}" for name in names)]
    depths = sorted(draw.random() for _ in names)
    said = [source.ids(f" VAR {name} = {value}.") for name, value in zip(names, values, strict=False)]
    return list(zip(depths, said, strict=True)), source.ids(_TRACKED.format(value=value, count=len(names)))


TRACKING = Task(_tracking, 30)
