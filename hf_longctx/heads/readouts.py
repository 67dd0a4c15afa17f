"""Tasks that show what a model still can: extractive questions, and sums that are reckoned step by step."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise, product
from random import Random
from typing import Any

import torch

from ..evals import needle, passkey
from ..evals import text as texts
from ..evals.haystack import Haystack
from ..evals.runner import Exam, Trial, derive
from ..evals.text import opening_ids, token_ids
from .pattern import message

TASKS = ("needle", "qa", "cot")

_TRADES = ("baker", "tailor", "potter", "miller", "cooper", "weaver", "glazier", "saddler", "brewer", "joiner")
_TOWNS = ("Larkholm", "Brenford", "Quillan", "Dunmore", "Tarrow", "Petrel", "Winterbourne", "Ashby", "Corvale", "Selby")
_PLACES = (
    "behind the old cheese market",
    "above the blue pharmacy",
    "next to the broken fountain",
    "under the stone bridge",
    "across from the silk museum",
    "beside the frozen canal",
    "inside the abandoned windmill",
    "near the copper gate",
)
_ASKED = "\n\nQuestion: Where does the {who} live?\nAnswer: The {who} lives"
_FACTS = 4

_NAMES = ["Ada", "Ben", "Tom", "Sam", "Max", "Leo", "Amy", "Kim", "Joe", "Dan", "Eva", "Ian"]
_SHOTS = 8


def exams(
    tokenizer: Any,
    tasks: Sequence[str],
    text: str | os.PathLike[str] | None,
    lengths: Sequence[int],
    depths: int,
    trials: int,
    seed: int,
) -> list[Exam]:
    """Tasks by name: `needle` is the pass key of `eval needle`, at every depth; the others have ten prompts a trial.

    Args:
        tokenizer: a transformers tokenizer.
        tasks: among `TASKS`.
        text: a UTF-8 file; None is the text that ships with the package.
        lengths: tokens in a prompt; sums take the shortest only, as theirs is the same at all.
        depths: of the pass key.
        trials: prompts for each length and depth.
        seed: of all draws.

    Raises:
        ValueError: an unknown task, one that comes twice, or fewer than one trial.
    """
    content = texts.read(text)
    about = texts.about(text, content)
    made = {
        "needle": lambda: passkey.exam(tokenizer, "needle", lengths, needle.spread(depths), trials, text, 8, seed),
        "qa": lambda: questions(tokenizer, content, about, lengths, 10 * trials, seed),
        "cot": lambda: sums(tokenizer, content, about, [min(lengths)], 10 * trials, seed),
    }
    for task in tasks:
        if task not in made or tasks.count(task) > 1:
            raise ValueError(message("tasks", f"each of {', '.join(TASKS)} once at most", repr(task), "Change them"))
    if trials < 1:
        raise ValueError(message("trials", "at least 1", f"{trials}", "Ask for more"))
    if not tasks:
        raise ValueError(message("tasks", f"some of {', '.join(TASKS)}", "none", "Name one"))
    return [made[task]() for task in tasks]


def questions(tokenizer: Any, text: str, about: dict[str, str], lengths: Sequence[int], trials: int, seed: int) -> Exam:
    """Where does one of four people live, all of whom the text speaks of in like sentences: the answer stands there.

    The score is the F1 of the words of the first sentence, as SQuAD counts them.

    Args:
        tokenizer: a transformers tokenizer.
        text: around the sentences.
        about: of the text, for `run_meta.json`.
        lengths: tokens in a prompt.
        trials: prompts for each length.
        seed: of all draws.
    """

    def prompts() -> Iterator[Trial]:
        hay, opening = Haystack(tokenizer, text), opening_ids(tokenizer)
        for length, trial in product(lengths, range(trials)):
            draw = Random(drawn := derive(seed, "qa", length, trial))
            who = [
                f"{a} of {b}" for a, b in zip(draw.sample(_TRADES, _FACTS), draw.sample(_TOWNS, _FACTS), strict=True)
            ]
            where = draw.sample(_PLACES, _FACTS)
            facts = [token_ids(tokenizer, f" The {a} lives {b}.") for a, b in zip(who, where, strict=True)]
            asked = token_ids(tokenizer, _ASKED.format(who=who[0]))
            room = _room("qa", length, [*opening, *chain(*facts), *asked])
            needles = [(round(draw.random(), 4), fact) for fact in facts]
            body, _ = hay.hide(needles, room, draw.randrange(len(hay.ids)))
            ids = torch.tensor(opening + body + asked)
            yield Trial("qa", length, needles[0][0], trial, drawn, ids, (where[0],), 16)

    return Exam("qa", prompts(), lambda answer, expected: f1(answer, expected[0]), about)


def sums(
    tokenizer: Any, text: str, about: dict[str, str], lengths: Sequence[int], trials: int, seed: int, people: int = 2
) -> Exam:
    """Who has how many, each by the one before: the model has seen some solved, and writes its own steps.

    Every step copies a name and a number from the question. The score is whether the last number is right.

    Args:
        tokenizer: a transformers tokenizer.
        text: whose beginning fills each prompt up to its length.
        about: of the text.
        lengths: tokens in a prompt.
        trials: prompts for each length.
        seed: of all draws.
        people: in a question: one step each. Models of 100M parameters add up two, larger ones more.
    """

    def prompts() -> Iterator[Trial]:
        hay, opening = Haystack(tokenizer, text), opening_ids(tokenizer)
        for length, trial in product(lengths, range(trials)):
            draw = Random(drawn := derive(seed, "cot", length, trial))
            solved = [_sum(draw, people) for _ in range(_SHOTS + 1)]
            shots = "".join(f"\n\n{asked}{steps}" for asked, steps, _ in solved[:-1])
            asked, _, answer = solved[-1]
            tail = token_ids(tokenizer, f"{shots}\n\n{asked}".rstrip())
            body, _ = hay.hide([], _room("cot", length, opening + tail), draw.randrange(len(hay.ids)))
            ids = torch.tensor(opening + body + tail)
            yield Trial("cot", length, None, trial, drawn, ids, (answer,), 60)

    return Exam(
        "cot", prompts(), lambda answer, expected: float(concludes(answer, expected[0])), {**about, "people": people}
    )


def _sum(draw: Random, count: int) -> tuple[str, str, str]:
    """A question, its steps, and the last number."""
    people, have = draw.sample(_NAMES, count), draw.randint(1, 5)
    facts, steps = [f"{people[0]} has {have} pears."], [f"{people[0]} has {have}."]
    for before, who in pairwise(people):
        more = draw.randint(1, 4)
        facts.append(f"{who} has {more} more than {before}.")
        steps.append(f"{who} has {have} + {more} = {have + more}.")
        have += more
    question = f"Question: {' '.join(facts)} How many pears does {people[-1]} have?\nAnswer: "
    return question, f"{' '.join(steps)} The answer is {have}.", str(have)


def _room(name: str, length: int, fixed: list[int]) -> int:
    """Tokens of the text."""
    if length <= len(fixed):
        advice = "Ask for longer prompts"
        raise ValueError(message(name, f"a length of at least {len(fixed) + 1} tokens", f"{length}", advice))
    return length - len(fixed)


def f1(answer: str, wanted: str) -> float:
    """F1 of the words of the answer's first sentence, in any case of letters."""
    said = re.split(r"[.\n]", answer.strip(), maxsplit=1)[0]
    have, want = (Counter(re.findall(r"\w+", words.lower())) for words in (said, wanted))
    common = (have & want).total()
    return 2 * common / (have.total() + want.total()) if common else 0.0


def concludes(answer: str, wanted: str) -> bool:
    """Whether the answer's first line concludes with the wanted number."""
    lines = answer.strip().splitlines()
    concluded = re.search(r"answer is (\d+)", lines[0]) if lines else None
    return concluded is not None and concluded.group(1) == wanted
