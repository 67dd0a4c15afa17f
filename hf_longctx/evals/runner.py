"""The one loop under the needle grid, the pass key and the RULER tasks: methods x trials, row by row."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..machine import device_name
from . import assets
from .grammar import Choice, methods
from .journal import Journal
from .respond import Answer, respond
from .team import Team, team_of

BASELINE = "dense"


@dataclass(frozen=True)
class Options:
    """How to run, whatever is asked.

    Attributes:
        chunk: tokens per call of the prefill: changes time and memory, not the result. None is 512 on a CPU, else 4096.
        batch: prompts of one length that run together.
        baseline: run `dense` first, even if it is not among the methods.
        seed: draws keys, depths and where in the text to begin.
        out: folder for the files; None writes none.
        resume: keep the trials that the files already have.
    """

    chunk: int | None = None
    batch: int = 1
    baseline: bool = True
    seed: int = 0
    out: Path | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        for name, value in (("chunk", self.chunk), ("batch", self.batch)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1; got {value}.")


DEFAULTS = Options()


@dataclass(frozen=True)
class Trial:
    """One prompt, and what the answer should hold.

    Attributes:
        task: name of what is asked.
        length: in tokens, as the user gave it.
        depth: of the needle, or None if there is not one.
        trial: number of several that differ in nothing but the seed.
        seed: that all draws came from.
        ids: `[T]`, int64: the prompt. All prompts of one task and length have one T.
        expected: strings.
        new_tokens: to generate.
    """

    task: str
    length: int
    depth: float | None
    trial: int
    seed: int
    ids: torch.Tensor
    expected: tuple[str, ...]
    new_tokens: int


@dataclass(frozen=True)
class Exam:
    """What is asked of every method.

    Attributes:
        name: of the files.
        trials: the prompts, built when they are needed.
        score: of an answer, 0 to 1, given the expected strings.
        settings: what decides about the prompts and the score, for `run_meta.json` and for a resumed run.
    """

    name: str
    trials: Iterable[Trial]
    score: Callable[[str, tuple[str, ...]], float]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One trial under one method, as a line of the JSONL file has it.

    Attributes:
        method: name of the choice, knobs included.
        score: 0 to 1.
        batch: prompts that ran together; `prefill_s` and `token_ms` are those of all of them.
        dense_score: of the baseline on the same prompt in the same run, None without one; the next two likewise.
    """

    method: str
    task: str
    length: int
    depth: float | None
    trial: int
    seed: int
    expected: list[str]
    answer: str
    score: float
    kv_bytes: int
    dense_kv_bytes: int
    density: float | None
    prefill_s: float
    token_ms: float | None
    batch: int
    dense_score: float | None
    dense_prefill_s: float | None
    dense_token_ms: float | None


def settle(model: Any, wanted: str, baseline: bool) -> list[Choice]:
    """The methods of a run, the baseline first, each tried on the model, so that a bad one costs no waiting.

    Raises:
        ValueError: a method or knob that is none.
        UnsupportedError: the model cannot do a method.
    """
    from .. import patched

    chosen = methods(wanted)
    named = any(choice.name == BASELINE for choice in chosen)
    first = [Choice(BASELINE, BASELINE)] if baseline or named else []
    chosen = first + [choice for choice in chosen if choice.name != BASELINE]
    for choice in chosen:
        with patched(model, choice.method, **choice.knobs):
            pass
    return chosen


def model_name(model: Any) -> str:
    """The model's name for a result file, without the path of any machine; its class if it was never loaded."""
    return assets.display_name(model.name_or_path) if model.name_or_path else type(model).__name__


def derive(seed: int, *parts: object) -> int:
    """A seed for one trial that does not depend on which others run."""
    return random.Random("/".join(map(str, (seed, *parts)))).getrandbits(32)


def run_exam(
    model: Any, tokenizer: Any, wanted: str, exam: Exam, options: Options, console: Console | None = None
) -> list[Row]:
    """Run every method on the same prompts; under `accelerate launch`, each process its share of them.

    Args:
        model: an unpatched causal language model; it is unpatched again afterwards.
        tokenizer: its tokenizer.
        wanted: methods, as `grammar.methods` reads them.
        exam: what is asked.
        options: how to run.
        console: where the bar goes; None shows none.

    Returns:
        A row for each method and trial, in that order; in every process, all of them.

    Raises:
        ValueError: a method, a knob, a prompt or a resumed file that does not fit; nothing ran.
        UnsupportedError: the model cannot do a method, or several processes have one model; nothing ran.
    """
    team = team_of(model, exam.name)
    chosen = settle(model, wanted, options.baseline)
    chunk = options.chunk or chunk_for(model.device)
    trials = list(exam.trials)
    journal = _journal(model, exam, chunk, options, team)
    done = {_key(row.method, row): row for row in (Row(**row) for row in (journal.rows if journal else []))}
    share = [trial for batch in team.share(list(_batches(trials, options.batch))) for trial in batch]
    found: list[Row] = []
    with bar(console if team.writes else None) as shown:
        task = shown.add_task("", total=len(chosen) * len(share), said="")
        for choice in chosen:
            mine = [done[key] for trial in share if (key := _key(choice.name, trial)) in done]
            shown.update(task, advance=len(mine))
            todo = [trial for trial in share if _key(choice.name, trial) not in done]
            for batch, said in answers(model, tokenizer, choice, todo, options.batch, chunk):
                bases = (done.get(_key(BASELINE, trial)) for trial in batch)
                graded = zip(batch, said, bases, strict=True)
                rows = [_row(choice, trial, answer, exam.score, len(batch), base) for trial, answer, base in graded]
                done |= {_key(choice.name, row): row for row in rows}
                mine, found = mine + rows, found + rows
                if journal:
                    journal.append([asdict(row) for row in rows])
                right = f"{sum(row.score for row in mine) / len(mine):.1%} right"
                shown.update(task, advance=len(rows), description=choice.name, said=right)
    done |= {_key(row.method, row): row for row in team.gather(found)}
    every = [done[_key(choice.name, trial)] for choice in chosen for trial in trials]
    if journal:
        journal.merge([asdict(row) for row in every])
    return every


def _key(method: str, which: Trial | Row) -> tuple[object, ...]:
    """What tells one trial of one method from all others of an evaluation."""
    return method, which.task, which.length, which.depth, which.trial


def chunk_for(device: torch.device) -> int:
    """Tokens per call of the prefill where nothing else is asked for."""
    return 512 if device.type == "cpu" else 4096


def bar(console: Console | None) -> Progress:
    """A bar for trials, with a field `said` beside; None shows none."""
    return Progress(
        TextColumn("{task.description:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console or Console(quiet=True),
    )


def _journal(model: Any, exam: Exam, chunk: int, options: Options, team: Team) -> Journal | None:
    """The files, if there is a folder for them."""
    if options.out is None:
        return None
    settings = {
        "model": model_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "chunk": chunk,
        "batch": options.batch,
        "seed": options.seed,
        "baseline": options.baseline,
        **exam.settings,
    }
    return Journal(options.out, exam.name, settings, model.device, options.resume, team)


def answers(
    model: Any, tokenizer: Any, choice: Choice, trials: list[Trial], size: int, chunk: int, least: int = 0
) -> Iterator[tuple[list[Trial], list[Answer]]]:
    """Answers of one method, batch by batch, each with its trials; kernels are warm. The last two as in `respond`."""
    from .. import patched

    if not trials:
        return
    warm = 0
    with patched(model, choice.method, **choice.knobs):
        for batch in _batches(trials, size):
            ids = torch.stack([trial.ids for trial in batch])
            # A first call compiles kernels and allocates: on a GPU for every shape, on a CPU no more than once.
            first = ids if model.device.type != "cpu" else ids[:, :64]
            if first.shape[1] > warm:
                respond(model, tokenizer, first, 2, chunk)
                warm = first.shape[1]
            yield batch, respond(model, tokenizer, ids, batch[0].new_tokens, chunk, least=least)


def _batches(trials: list[Trial], size: int) -> Iterator[list[Trial]]:
    """Neighbours of one task and length together, at most `size`."""
    batch: list[Trial] = []
    for trial in trials:
        if batch and (len(batch) == size or (trial.task, trial.length) != (batch[0].task, batch[0].length)):
            yield batch
            batch = []
        batch.append(trial)
    yield batch


def _row(
    choice: Choice,
    trial: Trial,
    answer: Answer,
    score: Callable[[str, tuple[str, ...]], float],
    batch: int,
    dense: Row | None,
) -> Row:
    """The row of a trial; the baseline is its own."""
    right = score(answer.text, trial.expected)
    base = (dense.score, dense.prefill_s, dense.token_ms) if dense else (None, None, None)
    if choice.name == BASELINE:
        base = (right, answer.prefill_s, answer.token_ms)
    place = (trial.task, trial.length, trial.depth, trial.trial, trial.seed, list(trial.expected))
    costs = (answer.kv_bytes, answer.dense_kv_bytes, answer.density, answer.prefill_s, answer.token_ms)
    return Row(choice.name, *place, answer.text, right, *costs, batch, *base)
