"""How much each query head copies, trial by trial, in the published format: `{"layer-head": [score, ...], ...}`.

Paper: Retrieval Head, arXiv 2404.15574, section 2.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray

from ..files import number, read_json, replacing
from .pattern import message

Head = tuple[int, int]
"""Layer and query head."""

_KEY = re.compile(r"(\d+)-(\d+)")
_AGAIN = "Find scores for this model with `hf-longctx heads detect`"
_NORMAL = 1.96


@dataclass(frozen=True)
class Share:
    """What all trials say of one head.

    Attributes:
        mean: of its scores; a retrieval head has at least 0.1.
        low: end of the 95 % interval of the mean, 1.96 standard errors below; None with a single trial.
        high: 1.96 above, likewise.
        active: share of the trials in which it copied at all.
    """

    mean: float
    low: float | None
    high: float | None
    active: float


@dataclass(frozen=True)
class HeadScores:
    """A score for each query head and kept trial.

    Args:
        trials: by head, equally many scores, at least one; 1 is the whole needle.
        name: the model's name, or a label.
        source: where they were read, for messages; not compared.

    Raises:
        ValueError: no heads, no trials, unequally many, or a score that is negative or not finite; names the head.
    """

    trials: Mapping[Head, tuple[float, ...]]
    name: str = "scores"
    source: str = field(default="scores", compare=False)

    def __post_init__(self) -> None:
        if not self.trials or not next(iter(self.trials.values())):
            advice = "The model answered no trial rightly; ask for shorter prompts, or other needles"
            raise ValueError(message(self.source, "scores of at least one trial", "none", advice))
        count = len(next(iter(self.trials.values())))
        for (layer, head), scores in self.trials.items():
            where = f"{self.source}, head {layer}-{head}"
            if len(scores) != count:
                raise ValueError(message(where, f"{count} trials, as in the first head", f"{len(scores)}", _AGAIN))
            if not all(math.isfinite(score) and score >= 0 for score in scores):
                bad = next(score for score in scores if not (math.isfinite(score) and score >= 0))
                raise ValueError(message(where, "scores of 0 or more", repr(bad), _AGAIN))

    @property
    def count(self) -> int:
        """Kept trials."""
        return len(next(iter(self.trials.values())))

    @cached_property
    def means(self) -> dict[Head, float]:
        """Mean score of each head; exactly the score where there is one trial."""
        return {head: math.fsum(scores) / len(scores) for head, scores in sorted(self.trials.items())}

    def ranked(self) -> list[Head]:
        """All heads, the largest mean first, of equal ones the first by layer and head."""
        return sorted(self.means, key=lambda head: (-self.means[head], head))

    def top(self, count: int) -> list[Head]:
        """The first of `ranked`.

        Raises:
            ValueError: fewer than one, or more than there are.
        """
        if not 1 <= count <= len(self.trials):
            advice = "Choose fewer" if count > 0 else "Choose some"
            raise ValueError(message("top", f"1 to {len(self.trials)} heads", f"{count}", advice))
        return self.ranked()[:count]

    def shares(self) -> dict[Head, Share]:
        """Mean, interval and activation frequency of each head."""
        found = {}
        for head, mean in self.means.items():
            scores = np.array(self.trials[head])
            active = float((scores > 0).mean())
            if len(scores) == 1:
                found[head] = Share(mean, None, None, active)
                continue
            error = _NORMAL * float(scores.std(ddof=1)) / math.sqrt(len(scores))
            found[head] = Share(mean, mean - error, mean + error, active)
        return found

    def halves(self, seed: int = 0) -> tuple[HeadScores, HeadScores]:
        """The trials in two disjoint halves, drawn at random: neighbours are alike in length, depth and needle.

        Raises:
            ValueError: there is one trial.
        """
        order = Random(seed).sample(range(self.count), self.count)
        parts = order[: self.count // 2], order[self.count // 2 :]
        both = ({head: tuple(s[i] for i in part) for head, s in self.trials.items()} for part in parts)
        first, second = (HeadScores(half, self.name, f"half of {self.source}") for half in both)
        return first, second

    def grid(self) -> NDArray[np.float64]:
        """Means as `[L][Hq]`; NaN where a layer has fewer heads."""
        layers, heads = (1 + max(head[i] for head in self.trials) for i in (0, 1))
        out = np.full((layers, heads), np.nan)
        for head, mean in self.means.items():
            out[head] = mean
        return out

    def check(self, q_heads: Sequence[int]) -> None:
        """Refuse scores that were not found on a model of this shape.

        Args:
            q_heads: query heads of each layer.

        Raises:
            ValueError: a head that the model does not have, or one of the model's that is missing; names it.
        """
        own = {(layer, head) for layer, heads in enumerate(q_heads) for head in range(heads)}
        shape = f"a head of the model ({len(q_heads)} layers of {max(q_heads)} query heads)"
        for layer, head in sorted(self.trials.keys() - own):
            raise ValueError(message(self.source, shape, f"{layer}-{head}", _AGAIN))
        for layer, head in sorted(own - self.trials.keys()):
            raise ValueError(message(self.source, f"scores of all {len(own)} heads", f"none of {layer}-{head}", _AGAIN))


def load_scores(path: str | os.PathLike[str]) -> HeadScores:
    """Read a file in the published format.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not such a file; names the file and the head.
    """
    name = os.fspath(path)
    raw = read_json(name, "scores", _AGAIN)
    if not isinstance(raw, dict):
        raise ValueError(message(name, '{"layer-head": [scores]}', type(raw).__name__, _AGAIN))
    trials = {}
    for key, scores in raw.items():
        read = _KEY.fullmatch(key)
        if read is None:
            raise ValueError(message(name, "heads named layer-head, such as 16-19", repr(key), _AGAIN))
        try:
            trials[int(read[1]), int(read[2])] = tuple(map(number, scores))
        except TypeError as error:
            raise ValueError(message(f"{name}, head {key}", "a list of numbers", str(error), _AGAIN)) from error
    return HeadScores(trials, Path(name).stem, name)


def save_scores(scores: HeadScores, path: str | os.PathLike[str]) -> None:
    """Write the published format, in one step; a failure leaves the old file. Read back, it is the same bit for bit."""
    with replacing(Path(path)) as scratch, open(scratch, "w", encoding="utf-8") as stream:
        json.dump({f"{layer}-{head}": list(each) for (layer, head), each in scores.trials.items()}, stream)
