"""How well captions agree with reference captions, word by word and second by second, without anybody's judgement.

A word that was said matches a word of the reference if they are the same but for case and signs, and at most
`tolerance_s` apart in time; each matches one other at most. A judge, any function of two texts, may be
plugged in beside.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..streaming.subtitles import Cue

Judge = Callable[[str, str], float]
"""Of a reference and what was said in the same stretch, to a score."""


@dataclass(frozen=True)
class Alignment:
    """The agreement of two caption tracks.

    Attributes:
        precision: share of the words said that match; 0 if nothing was said.
        recall: share of the words of the reference that are matched.
        f1: their harmonic mean.
        lag_s: mean seconds from the reference to what was said, of the matches; None without one.
        per_second: of each second of the stream, the share of its reference words that are matched; None where the
            reference is silent.
        judged: mean of the judge's scores over stretches with a reference; None without a judge.
    """

    precision: float
    recall: float
    f1: float
    lag_s: float | None
    per_second: tuple[float | None, ...]
    judged: float | None = None


def align(
    reference: Sequence[Cue],
    said: Sequence[Cue],
    tolerance_s: float = 1.0,
    judge: Judge | None = None,
    segment_s: float = 100.0,
) -> Alignment:
    """Match what was said with a reference.

    Args:
        reference: captions with a text. The words of one are spread evenly over its time.
        said: likewise.
        tolerance_s: seconds that a word may be early or late.
        judge: asked about each stretch of `segment_s` seconds that has a reference.
        segment_s: seconds of a stretch; the paper's have 100.

    Returns:
        The agreement.

    Raises:
        ValueError: no words in the reference, or a time out of range.
    """
    for name, value in (("tolerance_s", tolerance_s), ("segment_s", segment_s)):
        if not (math.isfinite(value) and value >= 0) or (name == "segment_s" and value == 0):
            raise ValueError(f"alignment: expected {name} of 0 or more seconds; got {value}.")
    wanted, got = words(reference), words(said)
    if not wanted:
        raise ValueError("alignment: expected words in the reference; got none. Is it the right file?")
    pairs = _matches(wanted, got, tolerance_s)
    precision, recall = len(pairs) / len(got) if got else 0.0, len(pairs) / len(wanted)
    f1 = 2 * precision * recall / (precision + recall) if pairs else 0.0
    lag = sum(got[b][0] - wanted[a][0] for a, b in pairs) / len(pairs) if pairs else None
    matched = {a for a, _ in pairs}
    seconds: list[list[bool]] = [[] for _ in range(int(max(t for t, _ in wanted)) + 1)]
    for index, (t, _) in enumerate(wanted):
        seconds[int(t)].append(index in matched)
    per_second = tuple(sum(each) / len(each) if each else None for each in seconds)
    judged = None if judge is None else _judged(reference, said, judge, segment_s)
    return Alignment(precision, recall, f1, lag, per_second, judged)


def words(cues: Sequence[Cue]) -> list[tuple[float, str]]:
    """Seconds and word, in order: a word of n lies in the middle of its n-th part of the caption's time."""
    found = []
    for cue in cues:
        each = re.findall(r"\w+", cue.text.casefold())
        step = max(cue.end - cue.start, 0.0) / len(each) if each else 0.0
        found += [(cue.start + (place + 0.5) * step, word) for place, word in enumerate(each)]
    return sorted(found)


def _matches(
    wanted: Sequence[tuple[float, str]], got: Sequence[tuple[float, str]], tolerance_s: float
) -> list[tuple[int, int]]:
    """As many pairs of one word as there can be, earliest first."""
    places: dict[str, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for side, listed in enumerate((wanted, got)):
        for index, (_, word) in enumerate(listed):
            places[word][side].append(index)
    pairs = []
    for mine, theirs in places.values():
        a = b = 0
        while a < len(mine) and b < len(theirs):
            apart = got[theirs[b]][0] - wanted[mine[a]][0]
            if abs(apart) <= tolerance_s:
                pairs.append((mine[a], theirs[b]))
                a, b = a + 1, b + 1
            elif apart > 0:
                a += 1
            else:
                b += 1
    return sorted(pairs)


def _judged(reference: Sequence[Cue], said: Sequence[Cue], judge: Judge, segment_s: float) -> float:
    """The mean over stretches in which the reference says something; a caption belongs to where it starts."""
    texts: dict[int, tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for side, cues in enumerate((reference, said)):
        for cue in cues:
            texts[int(cue.start / segment_s)][side].append(cue.text)
    scores = [judge(" ".join(mine), " ".join(theirs)) for _, (mine, theirs) in sorted(texts.items()) if mine]
    return sum(scores) / len(scores)
