"""Pictures of heads: a map of layers and heads, and bars of what is lost without some of them. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files import replacing

_COLOURS = ("#4c72b0", "#c44e52", "#8c8c8c", "#b5a642", "#64b5cd")


@dataclass(frozen=True)
class Map:
    """What one panel shows.

    Attributes:
        grid: `[L][H]`, NaN for heads that are not there.
        title: above it.
        unit: of its colours.
        column: what a column is.
        spread: draw below how often each value occurs.
    """

    grid: NDArray[np.float64]
    title: str
    unit: str
    column: str
    spread: bool = False


def heat_maps(maps: Sequence[Map], path: Path) -> None:
    """Draw layers down and heads across, a panel for each, below it a histogram where one is asked for, as a PNG."""
    widths = [2.4 + 0.28 * min(each.grid.shape[1], 40) for each in maps]
    heights = [1.2 + 0.2 * min(60, max(each.grid.shape[0] for each in maps))]
    if any(each.spread for each in maps):
        heights.append(1.6)
    size = (sum(widths), sum(heights))
    figure, rows = _figure(size, len(maps), len(heights), width_ratios=widths, height_ratios=heights)
    for panel, each in zip(rows[0], maps, strict=True):
        layers, heads = each.grid.shape
        top = max(1.0, float(np.nanmax(each.grid)))
        image = panel.imshow(np.ma.masked_invalid(each.grid), cmap="viridis", vmin=0, vmax=top, aspect="auto")
        panel.set_title(each.title, fontsize=10)
        panel.set_xlabel(each.column)
        panel.set_ylabel("layer")
        panel.set_xticks(range(0, heads, 1 if heads <= 16 else 4))
        panel.set_yticks(range(0, layers, 1 if layers <= 16 else 4))
        figure.colorbar(image, ax=panel, label=each.unit)
    for panel, each in zip(rows[-1] if len(rows) > 1 else (), maps, strict=False):
        panel.set_visible(each.spread)
        panel.hist(each.grid[np.isfinite(each.grid)], bins=20, range=(0, 1), color=_COLOURS[0])
        panel.set_xlabel(each.unit)
        panel.set_ylabel("heads")
    _save(figure, path)


def bars(summaries: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the score of every task under every kind of condition, as a PNG; a dot for each seed of random heads.

    Args:
        summaries: of `ablation.summarize`.
        path: of the PNG.
        title: above it.
    """
    tasks = list(dict.fromkeys(each["task"] for each in summaries))
    kinds = list(dict.fromkeys(each["condition"].split(" seed")[0] for each in summaries))
    figure, [[panel]] = _figure((2.6 + 1.5 * len(tasks), 3.4))
    panel.set_title(title, fontsize=10)
    width = 0.8 / len(kinds)
    for n, kind in enumerate(kinds):
        for t, task in enumerate(tasks):
            mine = [e for e in summaries if e["task"] == task and e["condition"].split(" seed")[0] == kind]
            scores = [100 * each["score"] for each in mine]
            at = t - 0.4 + (n + 0.5) * width
            label = None if t else {"whole": "none"}.get(kind, kind)
            panel.bar(at, mean(scores), 0.92 * width, color=_COLOURS[n % len(_COLOURS)], label=label)
            panel.text(at, mean(scores) + 1, f"{mean(scores):.0f}", ha="center", fontsize=8)
            if len(scores) > 1:
                panel.plot([at] * len(scores), scores, ".", color="black", markersize=4)
    panel.set_xticks(range(len(tasks)), tasks)
    panel.set_ylim(0, 112)
    panel.set_ylabel("score, %")
    panel.legend(title="heads ablated", frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    _save(figure, path)


def _figure(size: tuple[float, float], across: int = 1, down: int = 1, **ratios: Any) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(down, across, squeeze=False, gridspec_kw=ratios)


def _save(figure: Any, path: Path) -> None:
    """Write the PNG in one step."""
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=150, format="png")
