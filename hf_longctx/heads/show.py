"""What scores and gates say, as tables: the top heads, what a detection found, and whether two files agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..evals.results import save_json
from ..files import read_json
from .compare import overlap, spearman, stability
from .convert import to_pattern
from .detect import Row
from .pattern import HeadPattern, message
from .pattern_io import available_patterns, load_pattern, shipped_name
from .scores import Head, HeadScores, load_scores, save_scores

RETRIEVAL, STRONG = 0.1, 0.5
"""Mean scores from which the paper speaks of retrieval heads, and of strong ones."""


def read(source: str) -> HeadScores | HeadPattern:
    """A file of scores, a folder of gates, or the name of a shipped pattern.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: not such a file.
    """
    path = Path(source)
    if path.is_dir() or path.suffix == ".tsv" or (not path.exists() and shipped_name(source) in available_patterns()):
        return load_pattern(source)
    return load_scores(source)


def values(found: HeadScores | HeadPattern) -> dict[Head, float]:
    """Mean score of each query head, or the gate of each KV head."""
    if isinstance(found, HeadScores):
        return found.means
    return {(layer, head): gate for layer, row in enumerate(found.gates) for head, gate in enumerate(row)}


def top_heads(found: HeadScores | HeadPattern, count: int) -> Table:
    """The best heads; scores with their interval, and the share of the trials in which each copied at all."""
    each = values(found)
    ranked = sorted(each, key=lambda head: (-each[head], head))[:count]
    if isinstance(found, HeadPattern):
        shown = Table(title=f"{found.name}: {len(each)} KV heads, gates", title_justify="left")
        for column in ("KV head", "gate"):
            shown.add_column(column, justify="right")
        for layer, head in ranked:
            shown.add_row(f"{layer}-{head}", f"{each[layer, head]:.3f}")
        return shown
    numbers = (f"{sum(mean >= least for mean in each.values())} at {least} or more" for least in (RETRIEVAL, STRONG))
    many = " and ".join(numbers)
    title = f"{found.name}: {len(each)} query heads, {found.count} trials, {many}"
    shown = Table(title=title, title_justify="left")
    for column in ("query head", "mean score", "95 % interval", "active"):
        shown.add_column(column, justify="right")
    shares = found.shares()
    for layer, head in ranked:
        share = shares[layer, head]
        interval = "-" if share.low is None else f"{share.low:.3f} to {share.high:.3f}"
        shown.add_row(f"{layer}-{head}", f"{share.mean:.3f}", interval, f"{share.active:.0%}")
    return shown


def agreement(first: HeadScores | HeadPattern, second: HeadScores | HeadPattern, top: int) -> str:
    """Rank correlation and common top heads of two files, in a sentence; scores become gates where the other has gates.

    Raises:
        ValueError: they are of models of different shapes.
    """
    if isinstance(first, HeadPattern) != isinstance(second, HeadPattern):
        pattern = first if isinstance(first, HeadPattern) else second
        assert isinstance(pattern, HeadPattern)
        kv_heads = len(pattern.gates[0])
        first, second = (to_pattern(x, kv_heads) if isinstance(x, HeadScores) else x for x in (first, second))
    a, b = values(first), values(second)
    top = min(top, len(a))
    unit = "KV heads" if isinstance(first, HeadPattern) else "query heads"
    return (
        f"{first.name} and {second.name}: Spearman {spearman(a, b):.3f} over {len(a)} {unit}, "
        f"{round(overlap(a, b, top) * top)} of the top {top} in common"
    )


def summary(
    rows: Sequence[Row], scores: HeadScores, mode: str, kv_heads: Sequence[int], about: Mapping[str, Any]
) -> dict[str, Any]:
    """What a detection found beside the scores: how stable they are, what was answered where, and each head's numbers.

    Args:
        rows: of the run.
        scores: of those that are kept.
        mode: of the scores.
        kv_heads: of each layer; `heads convert` needs them.
        about: settings of the run.
    """
    kept = [row for row in rows if row.kept]
    cells = dict.fromkeys((row.length, row.depth) for row in rows)
    right = []
    for cell in cells:
        counts = (sum((row.length, row.depth) == cell for row in some) for some in (kept, rows))
        right.append(dict(zip(("length", "depth", "kept", "trials"), (*cell, *counts), strict=True)))
    halves = stability(scores)
    heads = [
        {"head": f"{n}-{h}", **asdict(share), "top_share": fmean(row.share[f"{n}-{h}"] for row in kept)}
        for (n, h), share in scores.shares().items()
    ]
    whole = {
        "model": scores.name,
        "mode": mode,
        "kept": len(kept),
        "trials": len(rows),
        "halves_spearman": halves,
    }
    return {**whole, "settings": dict(about), "kv_heads": list(kv_heads), "cells": right, "heads": heads}


def publish(
    rows: Sequence[Row],
    scores: HeadScores,
    mode: str,
    kv_heads: Sequence[int],
    about: Mapping[str, Any],
    out: Path,
    console: Console,
) -> None:
    """Store scores and `summary`, and show the top heads, how many trials were kept, and whether halves of them agree.

    Args:
        rows: as in `summary`, like the next four.
        scores: likewise.
        mode: likewise.
        kv_heads: likewise.
        about: likewise.
        out: the JSON file of scores; the summary goes to `<its name>_summary.json`.
        console: where tables go.
    """
    found = summary(rows, scores, mode, kv_heads, about)
    save_json(out.with_name(f"{out.stem}_summary.json"), found)
    save_scores(scores, out)
    console.print(top_heads(scores, 10))
    halves = found["halves_spearman"]
    agree = "" if halves is None else f"; Spearman of halves {halves:.3f} over {len(found['heads'])} heads"
    console.print(f"{found['kept']} of {found['trials']} trials kept{agree}")
    console.print(f"Scores: {out}", soft_wrap=True)


def draw(found: Sequence[HeadScores | HeadPattern], path: Path, console: Console) -> None:
    """Write the map of layers and heads of each, side by side, and how gates lie, or say what is missing for it."""
    if not find_spec("matplotlib"):
        console.print("No map: it needs matplotlib. pip install 'hf_longctx[plot]'", markup=False)
        return
    from .plot import Map, heat_maps

    maps = []
    for each in found:
        if isinstance(each, HeadScores):
            maps.append(Map(each.grid(), each.name, "mean score", "query head"))
        else:
            maps.append(Map(np.array(each.gates), each.name, "gate", "KV head", spread=True))
    heat_maps(maps, path)
    console.print(f"Map: {path}", soft_wrap=True)


def heads_of(source: str, model: str | None, given: int | None, which: str) -> int:
    """Heads of a layer: as given, of the model, or as the summary beside a file of scores says.

    Args:
        source: the file.
        model: a name or folder, of which the configuration is read.
        given: by the user.
        which: `kv_heads` or `q_heads`.

    Raises:
        ValueError: none of the three says it.
    """
    if given is not None:
        return given
    if model is not None:
        from transformers import AutoConfig

        text = AutoConfig.from_pretrained(model).get_text_config(decoder=True)
        heads = int(text.num_attention_heads)
        return heads if which == "q_heads" else int(getattr(text, "num_key_value_heads", None) or heads)
    beside = Path(source).with_name(f"{Path(source).stem}_summary.json")
    if which == "kv_heads" and beside.is_file():
        return int(read_json(str(beside), "a summary", "Pass --kv-heads")["kv_heads"][0])
    option = f"--{which.replace('_', '-')}"
    raise ValueError(message(source, f"{option} or --model", "neither", f"Pass {option} N, the number of one layer"))
