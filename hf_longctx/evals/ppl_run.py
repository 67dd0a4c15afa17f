"""A whole perplexity run: progress, files that grow method by method, table and plot."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .ppl import Row, Variant, evaluate, plot
from .results import meta, save_json


@dataclass(frozen=True)
class Settings:
    """What all methods of a run share; stored with the result.

    Attributes:
        model: name without the path of any machine.
        text: name of the file.
        text_sha256: of its content.
        tokens: of the text, at most.
        chunk: tokens per call.
        block: positions per row.
        dtype: of the weights and the cache.
    """

    model: str
    text: str
    text_sha256: str
    tokens: int
    chunk: int
    block: int
    dtype: str


def run(
    model: Any, ids: torch.Tensor, chosen: list[Variant], settings: Settings, out: Path, resume: bool, console: Console
) -> list[Row]:
    """Evaluate every variant, and save after each.

    Args:
        model: an unpatched causal language model.
        ids: `[tokens]`, int64.
        chosen: the variants.
        settings: to be stored; must equal those of a file that is resumed.
        out: folder for `ppl.json` and `ppl.png`.
        resume: keep what the file already has.
        console: where bars, table and notes go.

    Returns:
        All rows, in the order of the variants.

    Raises:
        ValueError: `resume`, and the file was made with other settings.
    """
    path = out / "ppl.json"
    done = _saved(path, settings, chosen) if resume and path.exists() else {}
    rows: list[Row] = []
    with Progress(
        TextColumn("{task.description:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    ) as bars:
        for variant in chosen:
            if variant.name not in done:
                task = bars.add_task(variant.name, total=min(len(ids), variant.limit or len(ids)) - 1)
                advance = partial(bars.advance, task)
                done[variant.name] = evaluate(model, ids, variant, settings.chunk, settings.block, advance)
            rows += done[variant.name]
            about = meta(model.device, {**asdict(settings), "methods": [asdict(v) for v in chosen]})
            save_json(path, {"meta": about, "rows": [asdict(row) for row in rows]})
    console.print(table(rows))
    _draw(model, rows, settings, out, console)
    return rows


def _saved(path: Path, settings: Settings, chosen: list[Variant]) -> dict[str, list[Row]]:
    """The rows of a former run, by method, of those variants that are the same today."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    former = stored["meta"]["settings"]
    for name, value in asdict(settings).items():
        if former.get(name) != value:
            raise ValueError(
                f"--resume: expected {path} to be made with {name}={value!r}; got {former.get(name)!r}. "
                "Use the same settings, another folder, or leave out --resume."
            )
    same = {v.name for v in chosen if asdict(v) in former["methods"]}
    rows = [Row(**row) for row in stored["rows"]]
    return {name: mine for name in same if (mine := [row for row in rows if row.method == name])}


def table(rows: list[Row]) -> Table:
    """Perplexity: a row per block, a column per method."""
    names = list(dict.fromkeys(row.method for row in rows))
    shown = Table(title="Perplexity per block of positions", title_justify="left")
    shown.add_column("positions", justify="right")
    for name in names:
        shown.add_column(name, justify="right")
    cells = {(row.start, row.method): row for row in rows}
    for start in sorted({row.start for row in rows}):
        here = {name: cells.get((start, name)) for name in names}
        stop = max(row.stop for row in here.values() if row)
        shown.add_row(f"{start:,}-{stop - 1:,}", *(f"{row.ppl:,.2f}" if row else "" for row in here.values()))
    last = [[row for row in rows if row.method == name][-1] for name in names]
    shown.add_section()
    shown.add_row("KV held at the end", *(f"{row.kv_bytes / 2**20:,.1f} MiB" for row in last))
    shown.add_row("time", *(f"{row.seconds:,.0f} s" for row in last))
    return shown


def _draw(model: Any, rows: list[Row], settings: Settings, out: Path, console: Console) -> None:
    """The plot, or a line that says what it needs."""
    console.print(f"Numbers: {out / 'ppl.json'}", soft_wrap=True)
    if find_spec("matplotlib") is None:
        console.print("No plot: it needs matplotlib. pip install 'hf_longctx[plot]'", markup=False)
        return
    title = f"{settings.model}, {settings.dtype}: perplexity per {settings.block:,} tokens of {settings.text}"
    trained = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    plot(rows, out / "ppl.png", title, trained)
    console.print(f"Plot: {out / 'ppl.png'}", soft_wrap=True)
