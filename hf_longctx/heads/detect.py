"""Which query heads copy the needle: trials, their scores, and the files that hold them.

Paper: Retrieval Head, arXiv 2404.15574, section 2. A head copies a token of the needle if the token is written while
that place of the prompt has most of the head's attention; its score is the share of the needle that it copied.
Differs: the span is found by the tokenizer's offsets, answers end where the model's generation configuration says, and
words are compared unstemmed. Both scores are kept: `paper` counts each place of the needle once, `code`, as the
authors' code does, every time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..evals.haystack import Haystack
from ..evals.journal import Journal
from ..evals.runner import bar, chunk_for, derive, model_name
from ..machine import device_name
from .needles import Hidden, Needle, hide
from .pattern import message
from .scores import Head, HeadScores
from .writing import Written, following, freely

MODES = ("paper", "code")
_RIGHT = 0.5


@dataclass(frozen=True)
class Settings:
    """What is asked, and how.

    Attributes:
        lengths: tokens in a prompt, at most.
        depths: of the needle, from 0 to 1.
        trials: prompts for each length and depth, each with another needle and another place in the book.
        forced: read the needle's answer in one call in place of writing one.
        chat: through the tokenizer's chat template.
        mode: of the scores, `paper` or `code`; the rows have both.
        new_tokens: to write at most.
        top: strongest keys whose share of the attention is noted.
        batch: prompts that run together.
        chunk: tokens per call of the prefill; None is 512 on a CPU, else 4096.
        seed: draws needles and places; a trial does not depend on which others there are.
    """

    lengths: Sequence[int]
    depths: Sequence[float]
    trials: int = 1
    forced: bool = False
    chat: bool = False
    mode: str = "paper"
    new_tokens: int = 50
    top: int = 4
    batch: int = 1
    chunk: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"trials": self.trials, "new_tokens": self.new_tokens, "top": self.top, "batch": self.batch}
        least |= {"chunk": 1 if self.chunk is None else self.chunk, "lengths": len(self.lengths)}
        for name, value in {**least, "depths": len(self.depths)}.items():
            if value < 1:
                raise ValueError(message(f"heads detect, {name}", "at least 1", f"{value}", "Ask for more"))
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise ValueError(message("heads detect", "depths from 0 to 1", f"{self.depths}", "0.5 is the middle"))
        if self.mode not in MODES:
            advice = "paper is the definition"
            raise ValueError(message("heads detect", f"a mode among {', '.join(MODES)}", repr(self.mode), advice))


@dataclass(frozen=True)
class Trial:
    """One prompt."""

    length: int
    depth: float
    trial: int
    seed: int
    hidden: Hidden

    @property
    def key(self) -> tuple[int, float, int]:
        """What tells it from the others of a run."""
        return self.length, self.depth, self.trial


@dataclass(frozen=True)
class Row:
    """What came of a trial, as a line of the JSONL file has it.

    Attributes:
        tokens: in the prompt.
        span: first and one-past-last token of the answer in it.
        answer: what was written; teacher-forced, what the model would have written at each place.
        recall: ROUGE-1 recall of the needle's answer.
        paper: by head, places of the span that it copied, each once; heads without any are left out.
        code: by head, how often it copied.
        share: by head, mean attention of its strongest keys.
    """

    length: int
    depth: float
    trial: int
    seed: int
    needle: str
    tokens: int
    span: tuple[int, int]
    answer: str
    recall: float
    paper: dict[str, int]
    code: dict[str, int]
    share: dict[str, float]

    @property
    def kept(self) -> bool:
        """Whether the answer is right: more than half of the words."""
        return self.recall > _RIGHT

    @property
    def key(self) -> tuple[int, float, int]:
        """As that of the trial."""
        return self.length, self.depth, self.trial


def prompts(tokenizer: Any, text: str, needles: Sequence[Needle], settings: Settings) -> list[Trial]:
    """The trials of a grid, by length.

    Raises:
        ValueError: a needle that is not in the prompt after tokenization, or a length without room.
    """
    hay, found = Haystack(tokenizer, text), []
    for length, depth in product(settings.lengths, settings.depths):
        first = derive(settings.seed, "needle", length, depth)
        for trial in range(settings.trials):
            drawn = derive(settings.seed, "heads", length, depth, trial)
            needle = needles[(first + trial) % len(needles)]
            where = f"needle {(first + trial) % len(needles) + 1}"
            hidden = hide(tokenizer, hay, needle, length, depth, settings.chat, drawn, where)
            found.append(Trial(length, depth, trial, drawn, hidden))
    return found


def run(
    model: Any,
    tokenizer: Any,
    trials: Sequence[Trial],
    settings: Settings,
    out: Path | None = None,
    about: dict[str, Any] | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> list[Row]:
    """Run all trials.

    Args:
        model: an unpatched causal language model; it is as it was afterwards.
        tokenizer: its tokenizer.
        trials: of `prompts`.
        settings: how to run.
        out: what the files are called: `<out without .json>.jsonl` gets a row as each trial ends; None writes nothing.
        about: what else decides about the trials, for `run_meta.json` and for a resumed run.
        resume: keep the trials that the file already has.
        console: where the bar goes.

    Raises:
        ValueError: a file of former rows and no `resume`, or rows of other settings.
        UnsupportedError: the model cannot be patched.
    """
    from .. import patched

    journal = _journal(model, settings, out, about or {}, resume)
    former = [Row(**{**row, "span": tuple(row["span"])}) for row in (journal.rows if journal else [])]
    rows = {row.key: row for row in former}
    todo = [trial for trial in trials if trial.key not in rows]
    with bar(console) as shown, patched(model, "dense"):
        task = shown.add_task("detect", total=len(trials), completed=len(trials) - len(todo), said="")
        for batch in _batches(todo, settings.batch):
            fresh = _rows(model, tokenizer, batch, settings)
            rows |= {row.key: row for row in fresh}
            if journal:
                journal.append([asdict(row) for row in fresh])
            said = f"{sum(row.kept for row in rows.values())} of {len(rows)} kept"
            shown.update(task, advance=len(fresh), said=said)
    return [rows[trial.key] for trial in trials]


def score(rows: Sequence[Row], heads: Sequence[int], mode: str, name: str) -> HeadScores:
    """Scores over the trials whose answers are right.

    Args:
        rows: of a run.
        heads: query heads of each layer.
        mode: `paper` or `code`.
        name: the model's name.

    Raises:
        ValueError: no answer was right.
    """
    kept = [row for row in rows if row.kept]
    if not kept:
        advice = "Nothing can be said of the heads: ask for shorter prompts, or other needles"
        raise ValueError(message("heads detect", "a right answer", f"none in {len(rows)} trials", advice))
    trials: dict[Head, tuple[float, ...]] = {}
    for layer, head in ((layer, head) for layer, count in enumerate(heads) for head in range(count)):
        counts = (getattr(row, mode).get(f"{layer}-{head}", 0) / (row.span[1] - row.span[0]) for row in kept)
        trials[layer, head] = tuple(counts)
    return HeadScores(trials, name)


def recall(said: str, wanted: str) -> float:
    """ROUGE-1 recall: share of the wanted words that were said, in any case of letters."""
    have, want = (Counter(re.findall(r"\w+", text.lower())) for text in (said, wanted))
    return (have & want).total() / want.total()


def copies(written: Written, hidden: Hidden) -> tuple[dict[str, int], dict[str, int]]:
    """How much of the needle each head copied: places, each once, and times; heads that copied nothing are left out."""
    low, high = hidden.span
    heads = list(written.places)
    place = torch.stack([written.places[head] for head in heads]).numpy()
    token = hidden.ids.numpy()[np.clip(place, low, high - 1)]
    hit = (place >= low) & (place < high) & (token == np.array(written.tokens, dtype=np.int64))
    once = np.zeros((len(heads), high - low), dtype=bool)
    row, step = hit.nonzero()
    once[row, place[row, step] - low] = True
    both = (counts.sum(1).tolist() for counts in (once, hit))
    paper, code = ({f"{n}-{h}": c for (n, h), c in zip(heads, each, strict=True) if c} for each in both)
    return paper, code


def _rows(model: Any, tokenizer: Any, batch: list[Trial], settings: Settings) -> list[Row]:
    """Run some trials together."""
    ids, chunk = [trial.hidden.ids for trial in batch], settings.chunk or chunk_for(model.device)
    if settings.forced:
        said = following(model, ids, [trial.hidden.answer_ids for trial in batch], chunk, settings.top)
    else:
        said = freely(model, tokenizer, ids, settings.new_tokens, chunk, settings.top)
    found = []
    for trial, written in zip(batch, said, strict=True):
        answer = tokenizer.decode(written.foretold, skip_special_tokens=True)
        paper, code = copies(written, trial.hidden)
        share = {f"{n}-{h}": round(float(x.mean()), 4) if len(x) else 0.0 for (n, h), x in written.shares.items()}
        needle = trial.hidden.needle
        right = recall(answer, needle.answer)
        place = (trial.length, trial.depth, trial.trial, trial.seed, needle.answer, len(trial.hidden.ids))
        found.append(Row(*place, trial.hidden.span, answer, right, paper, code, share))
    return found


def _batches(trials: list[Trial], size: int) -> Iterator[list[Trial]]:
    """Neighbours of one length together, so that there is little padding."""
    for _, same in groupby(trials, key=lambda trial: trial.length):
        mine = list(same)
        yield from (mine[start : start + size] for start in range(0, len(mine), size))


def _journal(model: Any, settings: Settings, out: Path | None, about: dict[str, Any], resume: bool) -> Journal | None:
    """The file of rows, if there is to be one. The grid may grow from run to run; what a trial is may not change."""
    if out is None:
        return None
    settled = {
        "model": model_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        **{name: getattr(settings, name) for name in ("forced", "chat", "new_tokens", "top", "batch", "seed")},
        "chunk": settings.chunk or chunk_for(model.device),
        **about,
    }
    return Journal(out.parent, out.stem, settled, model.device, resume)
