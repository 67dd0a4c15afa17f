"""Run RULER tasks under several methods."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from rich.console import Console

from .. import text as texts
from ..runner import DEFAULTS, Exam, Options, Row, Trial, derive, run_exam
from ..tables import publish
from .counting import COMMON_WORDS, FREQUENT_WORDS
from .retrieval import retrieval
from .source import Source, Task
from .tracking import TRACKING

TASKS: dict[str, Task] = {
    "niah_single": retrieval(keys=1, values=1, queries=1),
    "niah_multikey": retrieval(keys=4, values=1, queries=1),
    "niah_multivalue": retrieval(keys=1, values=4, queries=1),
    "niah_multiquery": retrieval(keys=4, values=1, queries=4),
    "vt": TRACKING,
    "cwe": COMMON_WORDS,
    "fwe": FREQUENT_WORDS,
}
"""Every family by the name that RULER gives it."""


def score(answer: str, expected: tuple[str, ...]) -> float:
    """Share of the expected strings that the answer holds, in any case of letters."""
    said = answer.lower()
    return sum(word.lower() in said for word in expected) / len(expected)


def check(tasks: Sequence[str], samples: int) -> None:
    """Refuse what is wrong for every model.

    Raises:
        ValueError: an unknown task, one that comes twice, or fewer than one sample.
    """
    for task in tasks:
        if task not in TASKS or tasks.count(task) > 1:
            raise ValueError(
                f"ruler: expected tasks among {', '.join(TASKS)}, each once; got '{task}'. Question answering (qa) is "
                "left out: its data sets do not come with the package."
            )
    if samples < 1 or not tasks:
        raise ValueError(f"ruler: expected at least 1 task and 1 sample; got {len(tasks)} and {samples}.")


def exam(
    tokenizer: Any,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    text: str | os.PathLike[str] | None,
    seed: int,
) -> Exam:
    """Prompts of every task and length.

    Raises:
        ValueError: as `check`.
    """
    check(tasks, samples)
    content = texts.read(text)

    def prompts() -> Iterator[Trial]:
        source = Source(tokenizer, content)
        for task, length, sample in product(tasks, lengths, range(samples)):
            drawn, new_tokens = derive(seed, task, length, sample), TASKS[task].new_tokens
            made = TASKS[task].build(task, source, length - new_tokens, drawn)
            yield Trial(task, length, None, sample, drawn, made.ids, made.expected, new_tokens)

    return Exam("ruler", prompts(), score, texts.about(text, content))


def run(
    model: Any,
    tokenizer: Any,
    methods: str,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int = 10,
    *,
    text: str | os.PathLike[str] | None = None,
    options: Options = DEFAULTS,
    console: Console | None = None,
) -> list[Row]:
    """Scores of RULER tasks under every method.

    Args:
        model: an unpatched causal language model.
        tokenizer: its tokenizer.
        methods: e.g. `dense,streaming_llm(sinks=4,window=508)`.
        tasks: names in `TASKS`.
        lengths: tokens of prompt and answer together, as the paper counts.
        samples: prompts for each task and length, the same for every method.
        text: a UTF-8 file that haystack and words come from; None is the text that ships with the package.
        options: how to run, and where files go: `ruler.jsonl`, `ruler_summary.json`, `run_meta.json`.
        console: where bar and table go; None shows nothing.

    Returns:
        A row for each method and trial.

    Raises:
        ValueError: an argument that does not fit; nothing ran.
        UnsupportedError: the model cannot do one of the methods; nothing ran.
    """
    asked = exam(tokenizer, tasks, lengths, samples, text, options.seed)
    rows = run_exam(model, tokenizer, methods, asked, options, console)
    publish(rows, "RULER tasks", options.out and options.out / "ruler_summary.json", console)
    return rows
