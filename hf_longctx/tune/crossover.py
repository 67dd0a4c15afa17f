"""From which length on a method is faster than dense attention, and the JSON file that says so. No tensors here.

`{"method": "crossover", "model": name, "family": config.model_type, "device": name, "dtype": "bfloat16",
"budget": 4096, "rows": [{"method": "dense", "length": 4096, "prefill_s": [0.5, ...], "token_ms": [8.1, ...]}, ...],
"meta": {...}}`, with rows of dense, quest and xattention at the same lengths, and a time for each run.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from ..files import read_json, whole
from ..machine import cache_dir

METHOD = "crossover"
BASELINE = "dense"
CANDIDATES = {"quest": "token_ms", "xattention": "prefill_s"}
"""Methods, and the time that each is to shorten."""

_AGAIN = "Measure again with `hf-longctx tune crossover`"


@dataclass(frozen=True)
class Timing:
    """What a method took at a length, in each of several runs.

    Args:
        method: its name.
        length: of the prompt.
        prefill_s: from the call to the first new token.
        token_ms: mean of the tokens after that.
    """

    method: str
    length: int
    prefill_s: tuple[float, ...]
    token_ms: tuple[float, ...]


@dataclass(frozen=True)
class Crossover:
    """Times of dense attention and of the candidates on one device, and what follows from them.

    Args:
        model: the model's name, for messages.
        family: `config.model_type` of the text model.
        device: its name.
        dtype: of the weights.
        budget: tokens that a decode step of quest read.
        rows: times, all methods at the same lengths.
        meta: how they were measured; not compared.
        source: where they were read, for messages; not compared.

    Raises:
        ValueError: lengths that are missing or come twice, another method, or a time that cannot be.
    """

    model: str
    family: str
    device: str
    dtype: str
    budget: int
    rows: tuple[Timing, ...]
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)
    source: str = field(default="crossover", compare=False)

    def __post_init__(self) -> None:
        expected = sorted((method, length) for method in (BASELINE, *CANDIDATES) for length in self.lengths)
        found = sorted((row.method, row.length) for row in self.rows)
        if not found or found != expected:
            raise ValueError(
                f"{self.source}: expected times of {', '.join((BASELINE, *CANDIDATES))}, each once at every length; "
                f"got {found or 'none'}. {_AGAIN}."
            )
        for row in self.rows:
            for name, values in (("length", (row.length,)), ("prefill_s", row.prefill_s), ("token_ms", row.token_ms)):
                if not values or not all(math.isfinite(value) and value > 0 for value in values):
                    raise ValueError(
                        f"{self.source}, {row.method} at {row.length} tokens: expected {name} > 0; got "
                        f"{', '.join(map(str, values)) or 'none'}. {_AGAIN}."
                    )

    @property
    def lengths(self) -> list[int]:
        """Measured lengths, ascending."""
        return sorted({row.length for row in self.rows})

    def took(self, method: str, length: int, what: str) -> float:
        """The median of `prefill_s` or `token_ms`."""
        return median(self._runs(method, length, what))

    def is_faster(self, candidate: str, length: int) -> bool:
        """True if every run of a candidate took less than every run of dense: else what differs may be chance.

        Up to its budget quest reads what dense reads, so it is never faster there.
        """
        if candidate == "quest" and length <= self.budget:
            return False
        mine, dense = (self._runs(method, length, CANDIDATES[candidate]) for method in (candidate, BASELINE))
        return max(mine) < min(dense)

    def faster_from(self, candidate: str) -> int | None:
        """The shortest length from which on a candidate was faster than dense wherever measured; None: none."""
        first = None
        for length in reversed(self.lengths):
            if not self.is_faster(candidate, length):
                break
            first = length
        return first

    def _runs(self, method: str, length: int, what: str) -> tuple[float, ...]:
        (runs,) = (getattr(row, what) for row in self.rows if (row.method, row.length) == (method, length))
        return tuple(runs)

    def describe(self) -> str:
        """What was found, with the times at the longest length."""
        longest = self.lengths[-1]
        parts = []
        for candidate, does, unit in (("quest", "decodes", "ms a token"), ("xattention", "reads prompts", "s")):
            mine, dense = (self.took(method, longest, CANDIDATES[candidate]) for method in (candidate, BASELINE))
            first = self.faster_from(candidate)
            since = f"{does} faster from {first:,} tokens on" if first else f"{does} no faster"
            parts.append(f"{candidate} {since} (at {longest:,}: {mine:.3g} {unit}, dense {dense:.3g})")
        return f"measured on {self.device} with {self.model}, {self.dtype}: {'; '.join(parts)}"

    def check(self, family: str, device: str, dtype: str) -> None:
        """Refuse times that are not of this family, device and type.

        Raises:
            ValueError: names what differs.
        """
        here = (("family", self.family, family), ("device", self.device, device), ("dtype", self.dtype, dtype))
        for name, mine, asked in here:
            if mine != asked:
                raise ValueError(
                    f"{self.source}: expected times for {name} '{asked}'; got '{mine}' (measured with '{self.model}'). "
                    f"{_AGAIN}."
                )

    def to_json(self) -> dict[str, Any]:
        """What the file holds."""
        head = {"method": METHOD, "model": self.model, "family": self.family, "device": self.device}
        rows = [asdict(row) for row in self.rows]
        return {**head, "dtype": self.dtype, "budget": self.budget, "rows": rows, "meta": dict(self.meta)}


def cached_path(family: str, device: str, dtype: str) -> Path:
    """Where a measurement is kept that nobody gave another place."""
    words = (re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-") for word in (device, family, dtype))
    return cache_dir() / METHOD / f"{'-'.join(words)}.json"


def read_crossover(given: str | os.PathLike[str] | Mapping[str, Any]) -> Crossover:
    """A measurement from its file, or from what such a file holds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON, not such a file, or a value that cannot be; names the file and the place.
    """
    name = "crossover" if isinstance(given, Mapping) else os.fspath(given)
    raw = given if isinstance(given, Mapping) else read_json(name, "crossover", _AGAIN)
    try:
        if raw["method"] != METHOD:
            raise ValueError(f"{name}: expected a measurement of '{METHOD}'; got one of '{raw['method']}'. {_AGAIN}.")
        rows = tuple(
            Timing(str(row["method"]), whole(row["length"]), _numbers(row["prefill_s"]), _numbers(row["token_ms"]))
            for row in raw["rows"]
        )
        model, family, device, dtype = (str(raw[key]) for key in ("model", "family", "device", "dtype"))
        return Crossover(model, family, device, dtype, whole(raw["budget"]), rows, dict(raw["meta"]), name)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{name}: expected a measurement of times; got {error!r} while reading it. {_AGAIN}."
        ) from error


def _numbers(values: Any) -> tuple[float, ...]:
    if type(values) is not list or any(type(value) not in (int, float) for value in values):
        raise TypeError(f"{values!r} in place of a list of numbers")
    return tuple(map(float, values))
