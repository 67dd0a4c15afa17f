"""The rows of a bench as a table, as lines that say from where on a method pays, and as plots."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..evals.journal import META
from ..evals.results import save_json
from .model import NAME
from .rows import BASELINE, Crossover, Row, crossovers, ratio

_GIB = 2**30


def publish(rows: Sequence[Row], out: Path, title: str, console: Console) -> None:
    """Show the table and where each method begins to pay, and store both plots beside the rows.

    Args:
        rows: of one run.
        out: the folder of the rows.
        title: above table and plots.
        console: where it goes.
    """
    found = crossovers(rows)
    save_json(out / f"{NAME}_crossover.json", [asdict(one) for one in found])
    console.print(table(rows, title))
    for one in found:
        console.print(describe(one), markup=False, soft_wrap=True)
    console.print(f"Numbers: {out / NAME}.jsonl ({META} has what it takes to run it again)", soft_wrap=True)
    if find_spec("matplotlib") is None:
        console.print("No plots: they need matplotlib. pip install 'hf_longctx[plot]'", markup=False)
        return
    plot_speed(rows, out / "bench_speed.png", title)
    plot_memory(rows, out / "bench_memory.png", title)
    console.print(f"Plots: {out / 'bench_speed.png'}, {out / 'bench_memory.png'}", soft_wrap=True)


def table(rows: Sequence[Row], title: str) -> Table:
    """A section for each length, a line for each method, and how many times as fast as dense of this run it is."""
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    lines = [(row, _cells(row)) for row in rows]
    columns = [name for name in _COLUMNS if any(cells.get(name) for _, cells in lines)]
    shown.add_column("method", overflow="fold", min_width=len(f"{max(row.length for row in rows):,} tokens"))
    for name in columns:
        shown.add_column(name, justify="right", no_wrap=True)
    for length in dict.fromkeys(row.length for row in rows):
        shown.add_row(f"[bold]{length:,} tokens[/]")
        for row, cells in lines:
            if row.length == length:
                shown.add_row(row.method, *(cells.get(name, "") for name in columns))
        shown.add_section()
    return shown


_COLUMNS = ("read, s", "TTFT, s", "x", "ms/token", "p10-p90", "x ", "KV, MiB", "host", "peak, GiB", "found")
"""Of the table; those that are empty in all rows are left out."""


def _cells(row: Row) -> dict[str, str]:
    """What stands in the columns, by their names."""
    if row.error is not None:
        return {_COLUMNS[0]: f"[red]{row.error.split(':')[0]}[/]"}
    base = row.method == BASELINE
    times = [
        None if base else ratio(*two)
        for two in ((row.dense_prefill_s, row.prefill_s), (row.dense_token_ms, row.token_ms))
    ]
    values: tuple[tuple[Any, Callable[[Any], str]], ...] = (
        (row.prefill_s, _three),
        (row.ttft_s, _three),
        (times[0], _two),
        (row.token_ms, _three),
        (row.token_p10_ms, lambda low: f"{_three(low)}-{_three(row.token_p90_ms or 0.0)}"),
        (times[1], _two),
        (row.kv_bytes, lambda size: _three(size / 2**20)),
        (row.host_bytes or None, lambda size: _three(size / 2**20)),
        (row.peak_bytes, lambda size: f"{size / _GIB:,.2f}"),
        (row.score, lambda share: f"{share:.0%}"),
    )  # fmt: skip
    return {name: form(value) for name, (value, form) in zip(_COLUMNS, values, strict=True) if value is not None}


def _two(value: float) -> str:
    return f"{value:.2f}"


def _three(value: float) -> str:
    """Three digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def describe(found: Crossover) -> str:
    """From which lengths on a method pays, and by how much at the longest."""
    if found.longest is None or found.decode_ratio is None or found.prefill_ratio is None:
        return f"{found.method}: nothing to compare, it or dense has no row."
    parts = []
    for verb, first, times, judged in (
        ("decodes", found.decode_from, found.decode_ratio, True),
        ("reads prompts", found.prefill_from, found.prefill_ratio, found.runs > 1),
    ):
        since = f"faster from {first:,} tokens on" if first else "no faster" if judged else "once, which may be chance"
        parts.append(f"{verb} {since} ({times:.2f}x dense at {found.longest:,})")
    return f"{found.method}: {', '.join(parts)}"


def plot_speed(rows: Sequence[Row], path: str | os.PathLike[str], title: str) -> None:
    """Draw seconds of a prompt and milliseconds of a token over length, a line for each method, as a PNG."""
    panels = [
        ("s to the first token", "ttft_s", None),
        ("ms a token, p10 to p90", "token_ms", ("token_p10_ms", "token_p90_ms")),
    ]
    _plot(rows, path, title, panels, 1.0)


def plot_memory(rows: Sequence[Row], path: str | os.PathLike[str], title: str) -> None:
    """Draw keys and values, and the most memory where the device counts it, over length, as a PNG."""
    panels: list[Any] = [("keys and values on the device, GiB", "kv_bytes", None)]
    if any(row.peak_bytes for row in rows):
        panels.append(("most memory held, weights included, GiB", "peak_bytes", None))
    _plot(rows, path, title, panels, 1 / _GIB)


def _plot(rows: Sequence[Row], path: str | os.PathLike[str], title: str, panels: Sequence[Any], unit: float) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(5.6 * len(panels), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontweight="bold")
    names = list(dict.fromkeys(row.method for row in rows))
    lengths = sorted({row.length for row in rows})
    for panel, (label, what, spread) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, name in enumerate(names):
            _line(panel, [row for row in rows if row.method == name], what, spread, unit, number)
        _crosses(panel, rows, names)
        panel.margins(y=0.12)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(lengths, [_short(length) for length in lengths])
        panel.set_xlabel("tokens in the prompt")
        panel.set_title(label, fontsize="medium", loc="left")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        panel.yaxis.set_minor_formatter(_some)
        panel.tick_params(which="both", labelsize=8)
        panel.grid(alpha=0.25, which="both")
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panel.get_legend_handles_labels()
    if any(row.error is not None for row in rows):
        handles.append(Line2D([], [], color="gray", linestyle="", marker="x", markeredgewidth=2))
        labels.append("no value: out of memory, or it failed")
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


_MARKS = "os^Dv<>P*h"


def _line(panel: Any, rows: Sequence[Row], what: str, spread: tuple[str, str] | None, unit: float, number: int) -> None:
    """One method, as far as it has values."""
    there = [row for row in rows if getattr(row, what)]
    values = [(row.length, unit * getattr(row, what)) for row in there]
    style = {"color": f"C{number % 10}"}
    dashed = "--" if rows[0].method == BASELINE else "-"
    xs, ys = zip(*values, strict=True) if values else ((), ())
    panel.plot(xs, ys, dashed, marker=_MARKS[number % len(_MARKS)], markersize=5, label=rows[0].method, **style)
    if spread is not None and there:
        low, high = ([unit * getattr(row, name) for row in there] for name in spread)
        panel.fill_between(xs, low, high, alpha=0.15, linewidth=0, **style)


def _crosses(panel: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    """Above a length, a cross for each method that has no value there, side by side."""
    for length in dict.fromkeys(row.length for row in rows):
        lost = [row.method for row in rows if row.length == length and row.error is not None]
        for place, name in enumerate(lost):
            panel.annotate(
                "\N{MULTIPLICATION SIGN}",
                (length, 0.95),
                xycoords=panel.get_xaxis_transform(),
                xytext=(10 * (place - len(lost) + 0.5), 0),
                textcoords="offset points",
                fontsize=15,
                fontweight="bold",
                color=f"C{names.index(name) % 10}",
                ha="center",
                va="center",
            )


def _some(value: float, _: int) -> str:
    """Some labels between powers of ten: a plot may span less than one."""
    return f"{value:g}" if f"{value:e}"[0] in "2357" else ""


def _short(length: int) -> str:
    """4096 as 4K, 1048576 as 1M."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if length % size == 0:
            return f"{length // size}{unit}"
    return f"{length:,}"
