"""The needle in a haystack: a pass key at every depth of every length, as a grid of colours for each method."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import zip_longest
from statistics import mean
from typing import Any

from rich.console import Console

from .passkey import exam
from .runner import DEFAULTS, Options, Row, model_name, run_exam
from .tables import publish
from .team import first

_ACROSS = 3
_COLOURS = ("#d7433f", "#f3c13a", "#2fae74")  # from lost to found; every cell has its number too


def spread(count: int) -> list[float]:
    """Depths at equal distances, from 0 (right after the instruction) to 1 (right before the question); one is 0.5.

    Raises:
        ValueError: fewer than one.
    """
    if count < 1:
        raise ValueError(f"depths: expected at least 1; got {count}.")
    return [round(i / (count - 1), 4) for i in range(count)] if count > 1 else [0.5]


def run(
    model: Any,
    tokenizer: Any,
    methods: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int = 1,
    *,
    text: str | os.PathLike[str] | None = None,
    new_tokens: int = 12,
    options: Options = DEFAULTS,
    console: Console | None = None,
) -> list[Row]:
    """Whether each method finds a pass key at every depth of every length.

    Args:
        model: an unpatched causal language model.
        tokenizer: its tokenizer.
        methods: e.g. `dense,streaming_llm(sinks=4,window=508)`.
        lengths: tokens in a prompt.
        depths: from 0 (right after the instruction) to 1 (right before the question), e.g. `spread(10)`.
        trials: prompts for each length and depth, the same for every method.
        text: a UTF-8 file around the needle; None is the text that ships with the package.
        new_tokens: to generate at most.
        options: how to run, and where files go: `needle.jsonl`, `needle_summary.json`, `needle.png`, `run_meta.json`.
        console: where bar and table go; None shows nothing.

    Returns:
        A row for each method and trial.

    Raises:
        ValueError: an argument that does not fit; nothing ran.
        UnsupportedError: the model cannot do one of the methods; nothing ran.
    """
    asked = exam(tokenizer, "needle", lengths, depths, trials, text, new_tokens, options.seed)
    rows = run_exam(model, tokenizer, methods, asked, options, console)
    publish(rows, "Needles found, mean of all depths", options.out and options.out / "needle_summary.json", console)
    if not first():
        return rows
    if options.out and find_spec("matplotlib"):
        plot(rows, options.out / "needle.png", f"{model_name(model)}: pass keys found")
    elif options.out and console:
        console.print("No plot: it needs matplotlib. pip install 'hf_longctx[plot]'", markup=False)
    return rows


def plot(rows: list[Row], path: str | os.PathLike[str], title: str = "Pass keys found") -> None:
    """Draw a panel for each method, depth over length, all in one scale of colours, as a PNG.

    Args:
        rows: of a needle run.
        path: of the PNG.
        title: above all panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.method for row in rows))
    lengths, depths = sorted({row.length for row in rows}), sorted({row.depth or 0.0 for row in rows})
    across = min(len(names), _ACROSS)
    down = math.ceil(len(names) / across)
    size = (1.1 + across * (1.0 + 0.62 * max(len(lengths), 3)), 0.9 + down * (1.0 + 0.3 * max(len(depths), 3)))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontweight="bold")
    colours = LinearSegmentedColormap.from_list("needle", _COLOURS)
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for place, (panel, name) in enumerate(zip_longest(panels.flat, names)):
        if name is None:
            panel.axis("off")
            continue
        mine = [row for row in rows if row.method == name]
        image = _panel(panel, mine, lengths, depths, colours)
        panel.tick_params(axis="x", labelbottom=place + across >= len(names))
    figure.supxlabel("tokens in the prompt", fontsize="medium")
    figure.supylabel("depth of the needle", fontsize="medium")
    bar = figure.colorbar(image, ax=panels, label="found", shrink=0.9, aspect=30, pad=0.02)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.savefig(path, dpi=150)


def _panel(panel: Any, rows: list[Row], lengths: list[int], depths: list[float], colours: Any) -> Any:
    """One method: coloured cells with their scores, and a title with the mean and the memory."""
    cells: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        cells.setdefault((depths.index(row.depth or 0.0), lengths.index(row.length)), []).append(row.score)
    grid = [[mean(cells.get((d, n), [math.nan])) for n in range(len(lengths))] for d in range(len(depths))]
    image = panel.imshow(grid, cmap=colours, vmin=0, vmax=1, aspect="auto")
    for (d, n), scores in cells.items():
        panel.text(n, d, f"{100 * mean(scores):.0f}", ha="center", va="center", fontsize=7, color="black")
    longest = [row for row in rows if row.length == lengths[-1]]
    share = mean(row.kv_bytes / row.dense_kv_bytes for row in longest)
    found = mean(row.score for row in rows)
    panel.set_title(
        f"{rows[0].method}\n{found:.0%} found, KV {share:.0%} of dense at {_short(lengths[-1])}", fontsize=9
    )
    panel.set_xticks(range(len(lengths)), [_short(length) for length in lengths], fontsize=8)
    panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
    panel.set_xticks([n + 0.5 for n in range(len(lengths) - 1)], minor=True)
    panel.set_yticks([d + 0.5 for d in range(len(depths) - 1)], minor=True)
    panel.grid(which="minor", color="white", linewidth=1)
    panel.tick_params(which="both", length=0)
    return image


def _short(length: int) -> str:
    """4096 as 4K."""
    return f"{length // 1024}K" if length % 1024 == 0 else f"{length:,}"
