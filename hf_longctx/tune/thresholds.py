"""Thresholds of XAttention per query head, and the JSON file that holds them. No tensors here.

`{"method": "xattention", "model": name, "family": config.model_type, "layers": L, "q_heads": Hq, "stride": 16,
"block": 128, "tau": [[...] per layer], "meta": {...}}`, one share of the attention per query head.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..files import number, read_json, whole

METHOD = "xattention"
_AGAIN = "Find thresholds for this model with `hf-longctx tune xattention`"


@dataclass(frozen=True)
class Thresholds:
    """How much of the scored attention each query head reads.

    Args:
        model: the model's name, for messages.
        family: `config.model_type` of the text model.
        stride: tokens of a tile.
        block: tokens of a block.
        tau: `[L][Hq]`, each in (0, 1]; layers with a sliding window of their own do not use theirs.
        meta: how they were found; not compared.
        source: where they were read, for messages; not compared.

    Raises:
        ValueError: no layer or head, layers of unequal numbers of heads, or a threshold outside (0, 1].
    """

    model: str
    family: str
    stride: int
    block: int
    tau: tuple[tuple[float, ...], ...]
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)
    source: str = field(default="thresholds", compare=False)

    def __post_init__(self) -> None:
        if not self.tau or not self.tau[0]:
            raise ValueError(f"{self.source}: expected thresholds of at least one layer and head; got none. {_AGAIN}.")
        for layer, row in enumerate(self.tau):
            if len(row) != self.q_heads:
                raise ValueError(
                    f"{self.source}, layer {layer}: expected {self.q_heads} query heads, as in layer 0; got "
                    f"{len(row)}. {_AGAIN}."
                )
            for head, tau in enumerate(row):
                if not (math.isfinite(tau) and 0 < tau <= 1):
                    raise ValueError(
                        f"{self.source}, layer {layer}, query head {head}: expected a threshold in (0, 1]; got {tau!r}."
                        " 0.9 is usual; 1 reads everything."
                    )

    @property
    def q_heads(self) -> int:
        """Query heads of a layer."""
        return len(self.tau[0])

    def check(self, family: str, layers: int, q_heads: int, stride: int, block: int) -> None:
        """Refuse thresholds that were not found for this model and these knobs.

        Raises:
            ValueError: names what differs.
        """
        here = (self.family, len(self.tau), self.q_heads, self.stride, self.block)
        names = ("family", "layers", "query heads", "stride", "block")
        for name, mine, asked in zip(names, here, (family, layers, q_heads, stride, block), strict=True):
            if mine != asked:
                advice = f"Use {name}={mine}, or find them anew" if name in ("stride", "block") else _AGAIN
                raise ValueError(
                    f"{self.source}: expected thresholds for {name} {asked!r}; got {mine!r} (found on '{self.model}'). "
                    f"{advice}."
                )

    def to_json(self) -> dict[str, Any]:
        """What the file holds."""
        return {
            "method": METHOD,
            "model": self.model,
            "family": self.family,
            "layers": len(self.tau),
            "q_heads": self.q_heads,
            "stride": self.stride,
            "block": self.block,
            "tau": [list(row) for row in self.tau],
            "meta": dict(self.meta),
        }


def load_thresholds(path: str | os.PathLike[str]) -> Thresholds:
    """Read a file of thresholds.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not JSON, not such a file, or a value that cannot be; names the file and the place.
    """
    name = os.fspath(path)
    raw = read_json(name, "thresholds", _AGAIN)
    try:
        if raw["method"] != METHOD:
            raise ValueError(f"{name}: expected thresholds of '{METHOD}'; got those of '{raw['method']}'. {_AGAIN}.")
        tau = tuple(tuple(map(number, row)) for row in raw["tau"])
        sizes = {size: whole(raw[size]) for size in ("layers", "q_heads", "stride", "block")}
        found = Thresholds(
            str(raw["model"]), str(raw["family"]), sizes["stride"], sizes["block"], tau, dict(raw["meta"]), name
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name}: expected a file of thresholds; got {error!r} while reading it. {_AGAIN}.") from error
    if (sizes["layers"], sizes["q_heads"]) != (len(tau), found.q_heads):
        raise ValueError(
            f"{name}: expected {sizes['layers']} layers of {sizes['q_heads']} thresholds, as it says itself; got "
            f"{len(tau)} of {found.q_heads}. {_AGAIN}."
        )
    return found
