"""Times of dense attention and of methods that might be faster, at several lengths: progress, table and file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..evals.grammar import Choice
from ..evals.respond import Answer
from ..evals.results import meta, save_json
from ..evals.runner import Trial, answers, bar, chunk_for, settle
from ..evals.text import opening_ids, token_ids
from ..methods import Quest
from ..methods.layouts import require_full_attention
from ..models import inspect_model
from .crossover import BASELINE, CANDIDATES, Crossover, Timing, cached_path

REPEATS = 3
"""Runs of each; the table shows their median."""

NEW_TOKENS = 33
"""Tokens that are generated: the first ends the prefill, the mean of the others is the time of a token."""


@dataclass(frozen=True)
class Settings:
    """What a measurement was asked for; stored with the result.

    Attributes:
        model: name without the path of any machine.
        lengths: of the prompts.
        budget: tokens that a decode step of quest reads.
        text: name of the file.
        text_sha256: of its content.
    """

    model: str
    lengths: tuple[int, ...]
    budget: int
    text: str
    text_sha256: str

    def __post_init__(self) -> None:
        Quest(self.budget)
        if not self.lengths or max(self.lengths) <= self.budget:
            raise ValueError(
                f"tune crossover: expected a length above the budget of {self.budget}, where quest reads less than "
                f"all; got {', '.join(map(str, self.lengths)) or 'none'}. Add a longer one, or lower the budget."
            )


def run(model: Any, tokenizer: Any, content: str, settings: Settings, out: Path | None, console: Console) -> Crossover:
    """Measure, show the times and what follows, and save them.

    Args:
        model: an unpatched causal language model.
        tokenizer: its tokenizer.
        content: the text that prompts are made of, over and over if it is short.
        settings: what was asked for.
        out: the JSON file; None: the place where `Auto` looks for it.
        console: where bar and table go.

    Raises:
        UnsupportedError: this model cannot do one of the methods; nothing ran.
    """
    facts = inspect_model(model)
    require_full_attention("tune crossover", facts)
    chosen = settle(model, f"quest(token_budget={settings.budget}),xattention(dense_below=0)", True)
    ids = torch.tensor(list(islice(_endless(tokenizer, content), max(settings.lengths))))
    rows = _measure(model, tokenizer, ids, chosen, settings.lengths, console)
    about = meta(model.device, {**asdict(settings), "repeats": REPEATS, "new_tokens": NEW_TOKENS})
    about["settings"]["chunk"] = chunk_for(model.device)
    found = Crossover(settings.model, facts.family, facts.device, facts.dtype, settings.budget, tuple(rows), about)
    console.print(table(found))
    console.print(found.describe(), markup=False, soft_wrap=True)
    path = out or cached_path(facts.family, facts.device, facts.dtype)
    save_json(path, found.to_json())
    console.print(f"Times: {path}", markup=False, soft_wrap=True)
    return found


def _endless(tokenizer: Any, content: str) -> Iterator[int]:
    yield from opening_ids(tokenizer)
    yield from cycle(token_ids(tokenizer, content))


def _measure(
    model: Any, tokenizer: Any, ids: torch.Tensor, chosen: list[Choice], lengths: Sequence[int], console: Console
) -> list[Timing]:
    """Some runs of every method at every length, one prompt at a time."""
    trials = [
        Trial("crossover", length, None, i, 0, ids[:length], (), NEW_TOKENS)
        for length in sorted(lengths)
        for i in range(REPEATS)
    ]
    rows = []
    with bar(console) as shown:
        task = shown.add_task("", total=len(chosen) * len(trials), said="")
        for choice in chosen:
            shown.update(task, description=choice.method)
            chunk = chunk_for(model.device)
            found: dict[int, list[Answer]] = {}
            for (trial,), (answer,) in answers(model, tokenizer, choice, trials, 1, chunk, NEW_TOKENS):
                found.setdefault(trial.length, []).append(answer)
                shown.advance(task)
            for length, runs in found.items():
                token_ms = tuple(run.token_ms for run in runs if run.token_ms is not None)
                rows.append(Timing(choice.method, length, tuple(run.prefill_s for run in runs), token_ms))
    return rows


def table(found: Crossover) -> Table:
    """Median times, a row for each length; bold where a candidate was faster than dense."""
    shown = Table(title=f"{found.model}, {found.dtype}, on {found.device}", title_justify="left")
    shown.add_column("tokens", justify="right")
    columns = [(method, what) for what in ("prefill_s", "token_ms") for method in (BASELINE, *CANDIDATES)]
    for method, what in columns:
        shown.add_column(f"{method}\n{'prefill, s' if what == 'prefill_s' else 'ms a token'}", justify="right")
    for length in found.lengths:
        cells = []
        for method, what in columns:
            cell = f"{found.took(method, length, what):,.3f}"
            faster = CANDIDATES.get(method) == what and found.is_faster(method, length)
            cells.append(f"[bold]{cell}[/]" if faster else cell)
        shown.add_row(f"{length:,}", *cells)
    return shown
