"""Many rows in a few: means per method, task and length, as records and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from .journal import META
from .results import save_json
from .runner import Row
from .team import first


@dataclass(frozen=True)
class Summary:
    """All trials of one method, task and length.

    Attributes:
        method: name of the choice, knobs included.
        task: what was asked.
        length: of the prompts, as the user gave it.
        trials: how many.
        score: their mean, 0 to 1.
        kv_bytes: mean per prompt.
        dense_kv_bytes: mean per prompt.
        density: mean share of the keys that was read; None if the method does not measure it.
        prefill_s: median, of a whole batch.
        token_ms: median, of a whole batch; None if no answer had two tokens.
        batch: prompts that ran together, at most.
        dense_score: of the baseline in the same run, None without one; the next two likewise.
    """

    method: str
    task: str
    length: int
    trials: int
    score: float
    kv_bytes: float
    dense_kv_bytes: float
    density: float | None
    prefill_s: float
    token_ms: float | None
    batch: int
    dense_score: float | None
    dense_prefill_s: float | None
    dense_token_ms: float | None


def summarize(rows: list[Row]) -> list[Summary]:
    """A summary for each method, task and length, in the order of their first rows."""
    found = []
    for method, task, length in dict.fromkeys((row.method, row.task, row.length) for row in rows):
        mine = [row for row in rows if (row.method, row.task, row.length) == (method, task, length)]
        found.append(
            Summary(
                method,
                task,
                length,
                trials=len(mine),
                score=mean(row.score for row in mine),
                kv_bytes=mean(row.kv_bytes for row in mine),
                dense_kv_bytes=mean(row.dense_kv_bytes for row in mine),
                density=_over(mean, [row.density for row in mine]),
                prefill_s=median(row.prefill_s for row in mine),
                token_ms=_over(median, [row.token_ms for row in mine]),
                batch=max(row.batch for row in mine),
                dense_score=_over(mean, [row.dense_score for row in mine]),
                dense_prefill_s=_over(median, [row.dense_prefill_s for row in mine]),
                dense_token_ms=_over(median, [row.dense_token_ms for row in mine]),
            )
        )
    return found


def _over(fold: Callable[[list[float]], float], values: list[float | None]) -> float | None:
    """A mean or median of the values that are there."""
    known = [value for value in values if value is not None]
    return fold(known) if known else None


def table(summaries: list[Summary], title: str) -> Table:
    """Scores, a row for each task and length, a column for each method; below, what the longest prompts cost."""
    names = list(dict.fromkeys(summary.method for summary in summaries))
    cells = list(dict.fromkeys((summary.task, summary.length) for summary in summaries))
    scores = {(summary.method, summary.task, summary.length): summary.score for summary in summaries}
    shown = Table(title=title, title_justify="left")
    several = len({task for task, _ in cells}) > 1
    for column in ("task", "tokens")[not several :]:
        shown.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    for name in names:
        shown.add_column(name, justify="right", overflow="fold")

    def add(label: str, values: list[str]) -> None:
        shown.add_row(label, *[""] * several, *values)

    for task, length in cells:
        right = [f"{scores[name, task, length]:.1%}" for name in names]
        shown.add_row(*[task] * several, f"{length:,}", *right)
    if len(cells) > 1:
        add("mean", [f"{mean(scores[name, task, length] for task, length in cells):.1%}" for name in names])
    shown.add_section()
    longest = max(length for _, length in cells)
    for label, values in _costs(longest, names, summaries).items():
        add(label, values)
    shown.caption = f"Costs are those of {longest:,} tokens." if len({length for _, length in cells}) > 1 else None
    return shown


def _costs(length: int, names: list[str], summaries: list[Summary]) -> dict[str, list[str]]:
    """Lines of the table below the scores, over all tasks of one length."""

    def line(pick: Callable[[Summary], float | None], form: Callable[[Any], str]) -> list[str]:
        found = []
        for name in names:
            value = _over(mean, [pick(s) for s in summaries if s.method == name and s.length == length])
            found.append("-" if value is None else form(value))
        return found

    lines = {
        "KV held": line(lambda s: s.kv_bytes, lambda value: f"{value / 2**20:,.1f} MiB"),
        "of dense": line(lambda s: s.kv_bytes / s.dense_kv_bytes, lambda value: f"{value:.0%}"),
        "keys read": line(lambda s: s.density, lambda value: f"{value:.1%}"),
        "prefill": line(lambda s: s.prefill_s, lambda value: f"{value:,.2f} s"),
        "per token": line(lambda s: s.token_ms, lambda value: f"{value:,.1f} ms"),
    }
    return {label: values for label, values in lines.items() if set(values) != {"-"}}


def publish(rows: list[Row], title: str, path: Path | None, console: Console | None) -> None:
    """Show the table and store the summaries.

    Args:
        rows: of one evaluation.
        title: above the table.
        path: of a JSON file; None writes none.
        console: None shows nothing.
    """
    if not first():
        return
    summaries = summarize(rows)
    if path:
        save_json(path, [asdict(summary) for summary in summaries])
    if console:
        console.print(table(summaries, title))
    if console and path:
        console.print(
            f"Numbers: {path.parent} ({path.name} has means, {META} what it takes to run it again)", soft_wrap=True
        )
