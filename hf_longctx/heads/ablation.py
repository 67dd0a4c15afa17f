"""What a model can do without some of its heads: every task whole, without the best, and without random ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..evals.grammar import Choice
from ..evals.haystack import Haystack
from ..evals.journal import Journal
from ..evals.results import save_json
from ..evals.runner import Exam, Trial, answers, bar, chunk_for, model_name
from ..machine import device_name
from .ablate import PHASES, ablated, mean_outputs
from .compare import layer_matched
from .pattern import message
from .plot import bars
from .scores import Head, HeadScores

WHOLE = "whole"
_MEAN_OVER = 1024


@dataclass(frozen=True)
class Condition:
    """Heads that are ablated together, by a name for tables; `whole` ablates none."""

    name: str
    heads: tuple[Head, ...]


@dataclass(frozen=True)
class How:
    """How heads are ablated and prompts run.

    Attributes:
        mode: as in `ablated`, like the next two.
        phases: of the queries.
        window: of `local`.
        batch: prompts that run together.
        chunk: tokens per call of the prefill; None: 512 on a CPU, else 4096, and a whole prompt where only one phase is
            ablated, as chunks blur the border.
        out: folder for `ablate.jsonl` and `run_meta.json`; None writes none.
        resume: keep the trials that the folder already has.
        about: of the scores, for `run_meta.json`.
    """

    mode: str = "zero"
    phases: tuple[str, ...] = PHASES
    window: int = 64
    batch: int = 1
    chunk: int | None = None
    out: Path | None = None
    resume: bool = False
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("chunk", 1 if self.chunk is None else self.chunk)):
            if value < 1:
                raise ValueError(message(f"heads ablate, {name}", "at least 1", f"{value}", "Ask for more"))


@dataclass(frozen=True)
class Row:
    """One trial under one condition, as a line of the JSONL file has it."""

    condition: str
    task: str
    length: int
    depth: float | None
    trial: int
    seed: int
    expected: list[str]
    answer: str
    score: float


def conditions(scores: HeadScores, q_heads: Sequence[int], top: int, seeds: Sequence[int]) -> list[Condition]:
    """The whole model, without its `top` best heads, and without as many random ones of the same layers for each seed.

    Raises:
        ValueError: scores of another model, or more heads than there are.
    """
    scores.check(q_heads)
    best = scores.top(top)
    found = [Condition(WHOLE, ()), Condition(f"top {top}", tuple(best))]
    return found + [Condition(f"random {top} seed {s}", tuple(layer_matched(best, q_heads, s))) for s in seeds]


def run(
    model: Any,
    tokenizer: Any,
    exams: Sequence[Exam],
    asked: Sequence[Condition],
    text: str,
    how: How,
    console: Console | None = None,
) -> list[Row]:
    """Run every task under every condition, on the same prompts.

    Args:
        model: an unpatched causal language model; it is as it was afterwards.
        tokenizer: its tokenizer.
        exams: tasks of different names.
        asked: of `conditions`.
        text: over whose first tokens mean outputs are taken, for the mode `mean`.
        how: heads are ablated.
        console: where the bar goes.

    Returns:
        A row for each condition, task and trial, in that order.

    Raises:
        ValueError: an ablation that cannot be, or a resumed file that does not fit.
        UnsupportedError: the model cannot be patched.
    """
    from .. import patched

    trials = {exam.name: list(exam.trials) for exam in exams}
    chunk = how.chunk or _chunk(model, trials, how)
    done: dict[tuple[object, ...], Row] = {}
    with patched(model, "dense"), bar(console) as shown:
        means = _means(model, tokenizer, text) if how.mode == "mean" else None
        for each in asked:  # what cannot be is refused before anything runs
            with ablated(model, each.heads, how.mode, how.phases, how.window, means):
                pass
        journal = _journal(model, exams, asked, how, chunk)
        done |= {_key(row.condition, row): row for row in (Row(**row) for row in (journal.rows if journal else []))}
        task = shown.add_task("", total=len(asked) * sum(map(len, trials.values())), said="")
        for each in asked:
            with ablated(model, each.heads, how.mode, how.phases, how.window, means):
                for exam in exams:
                    rest = [trial for trial in trials[exam.name] if _key(each.name, trial) not in done]
                    shown.update(task, advance=len(trials[exam.name]) - len(rest), description=each.name)
                    for rows in _run(model, tokenizer, exam, each, rest, how.batch, chunk):
                        done |= {_key(each.name, row): row for row in rows}
                        if journal:
                            journal.append([asdict(row) for row in rows])
                        shown.update(task, advance=len(rows), said=exam.name)
    return [done[_key(each.name, t)] for each in asked for exam in exams for t in trials[exam.name]]


def _means(model: Any, tokenizer: Any, text: str) -> dict[Head, Tensor]:
    """Mean outputs over the first tokens of a text."""
    return mean_outputs(model, torch.tensor(Haystack(tokenizer, text).ids[:_MEAN_OVER]))


def _run(
    model: Any, tokenizer: Any, exam: Exam, which: Condition, trials: list[Trial], batch: int, chunk: int
) -> Iterator[list[Row]]:
    """Rows of one task under the condition in force."""
    for some, said in answers(model, tokenizer, Choice("dense", "dense"), trials, batch, chunk):
        rows = []
        for trial, answer in zip(some, said, strict=True):
            place = (trial.task, trial.length, trial.depth, trial.trial, trial.seed, list(trial.expected))
            rows.append(Row(which.name, *place, answer.text, exam.score(answer.text, trial.expected)))
        yield rows


def summarize(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Mean score of each condition and task, and how much less that is than what the whole model has."""
    found = []
    for condition, task in dict.fromkeys((row.condition, row.task) for row in rows):
        scores = [row.score for row in rows if (row.condition, row.task) == (condition, task)]
        whole = [row.score for row in rows if (row.condition, row.task) == (WHOLE, task)]
        about = {"condition": condition, "task": task, "trials": len(scores), "score": mean(scores)}
        found.append({**about, "drop": mean(whole) - mean(scores)})
    return found


def table(summaries: Sequence[dict[str, Any]], title: str) -> Table:
    """Conditions down, tasks across: score, and points lost."""
    tasks = list(dict.fromkeys(each["task"] for each in summaries))
    shown = Table(title=title, title_justify="left")
    shown.add_column("heads ablated")
    for task in tasks:
        shown.add_column(task, justify="right")
    cells = {(each["condition"], each["task"]): each for each in summaries}
    for condition in dict.fromkeys(each["condition"] for each in summaries):
        mine = [cells[condition, task] for task in tasks]
        lost = ["" if condition == WHOLE else f" ({-100 * each['drop']:+.0f})" for each in mine]
        said = [f"{100 * each['score']:.0f}{less}" for each, less in zip(mine, lost, strict=True)]
        shown.add_row("none" if condition == WHOLE else condition, *said)
    return shown


def _key(condition: str, which: Trial | Row) -> tuple[object, ...]:
    return condition, which.task, which.length, which.depth, which.trial


def _chunk(model: Any, trials: dict[str, list[Trial]], how: How) -> int:
    """Tokens per call of the prefill."""
    longest = max(len(trial.ids) for some in trials.values() for trial in some)
    return chunk_for(model.device) if set(how.phases) == set(PHASES) else longest


def _journal(model: Any, exams: Sequence[Exam], asked: Sequence[Condition], how: How, chunk: int) -> Journal | None:
    """The files, if there is a folder for them."""
    if how.out is None:
        return None
    settings = {
        "model": model_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "mode": how.mode,
        "phases": sorted(how.phases),
        "window": how.window,
        "batch": how.batch,
        "chunk": chunk,
        "heads": {each.name: [f"{layer}-{head}" for layer, head in each.heads] for each in asked},
        "tasks": {exam.name: exam.settings for exam in exams},
        **how.about,
    }
    return Journal(how.out, "ablate", settings, model.device, how.resume)


def publish(rows: Sequence[Row], title: str, out: Path, console: Console) -> None:
    """Show the table, and store the means and a plot."""
    found = summarize(rows)
    save_json(out / "ablate_summary.json", found)
    console.print(table(found, title))
    if find_spec("matplotlib"):
        bars(found, out / "ablate.png", title)
    else:
        console.print("No plot: it needs matplotlib. pip install 'hf_longctx[plot]'", markup=False)
    console.print(f"Numbers: {out}", soft_wrap=True)
