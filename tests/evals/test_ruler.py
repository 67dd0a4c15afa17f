from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from hf_longctx.evals import text
from hf_longctx.evals.ruler import TASKS, run
from hf_longctx.evals.ruler.run import exam, score
from hf_longctx.evals.ruler.source import Prompt, Source

NIAH = ("niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def source(tokenizer: Any) -> Source:
    return Source(tokenizer, text.shipped())


def build(task: str, source: Source, length: int, seed: int = 0) -> Prompt:
    return TASKS[task].build(task, source, length, seed)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [1200, 1201, 2777])
def test_a_prompt_is_as_long_as_asked_and_the_seed_decides_it(task: str, length: int, source: Source) -> None:
    made, again, other = (build(task, source, length, seed) for seed in (3, 3, 4))
    assert len(made.ids) == len(other.ids) == length
    assert made.ids.tolist() == again.ids.tolist()
    assert made.expected == again.expected
    assert made.expected != other.expected
    assert len(set(made.expected)) == len(made.expected)


@pytest.mark.parametrize(("task", "answers", "needles"), list(zip(NIAH, (1, 1, 4, 4), (1, 4, 4, 4), strict=True)))
def test_every_number_that_is_asked_for_stands_once_where_it_says(
    task: str, answers: int, needles: int, source: Source, tokenizer: Any
) -> None:
    made = build(task, source, 1500, 1)
    whole = tokenizer.decode(made.ids)
    assert len(made.expected) == len(made.facts) == answers
    assert whole.count("One of the special magic numbers for") == needles
    asked = whole.split("mentioned in the provided text?")[-2].split("magic number")[-1]
    for number, (first, end) in zip(made.expected, made.facts, strict=True):
        fact = re.fullmatch(
            r" One of the special magic numbers for ([\w-]+) is: (\d{7})\.", tokenizer.decode(made.ids[first:end])
        )
        assert fact is not None
        assert fact[1] in asked
        assert fact[2] == number
        assert whole.count(number) == 1


def test_the_other_keys_are_not_asked_for(source: Source, tokenizer: Any) -> None:
    whole = tokenizer.decode(build("niah_multikey", source, 1500, 1).ids)
    named = re.findall(r"magic numbers for ([\w-]+) is:", whole)
    assert len(set(named)) == 4
    assert sum(name in whole.rsplit("\n", 1)[1] for name in named) == 1


def test_a_chain_leads_from_its_value_to_every_name(source: Source, tokenizer: Any) -> None:
    made = build("vt", source, 1500, 2)
    said = [tokenizer.decode(made.ids[first:end]) for first, end in made.facts]
    question = tokenizer.decode(made.ids).rsplit("\nQuestion:", 1)[1]
    value = re.findall(r"the value (\d+)", question)
    assert len(set(value)) == 1
    assert said == [
        f" VAR {name} = {before}."
        for name, before in zip(made.expected, [value[0], *(f"VAR {n}" for n in made.expected)], strict=False)
    ]
    assert [first for first, _ in made.facts] == sorted(first for first, _ in made.facts)
    assert "5 variables" in question


@pytest.mark.parametrize(("length", "times"), [(1400, 3), (9000, 30)])
def test_the_common_words_of_a_list_are_more_common_than_all_others(
    length: int, times: int, source: Source, tokenizer: Any
) -> None:
    whole = tokenizer.decode(build("cwe", source, length, 5).ids)
    made = build("cwe", source, length, 5)
    listed = whole.rsplit("appear most often.\n", 1)[1].split("\nQuestion:")[0]
    numbers, words = zip(*re.findall(r"(\d+)\. ([a-z]+)", listed), strict=True)
    assert [int(number) for number in numbers] == list(range(1, len(words) + 1))
    counts = Counter(words).most_common()
    assert {word for word, _ in counts[:10]} == set(made.expected)
    assert counts[9][1] >= times
    assert counts[9][1] >= 3 * counts[10][1]
    assert len(listed) - len(listed.rstrip("\n")) < 40


def test_the_frequent_words_of_a_code_are_so_in_that_order(source: Source, tokenizer: Any) -> None:
    made = build("fwe", source, 1400, 5)
    coded = tokenizer.decode(made.ids).split("coded words.\n")[1].split("\nQuestion:")[0].split()
    counts = Counter(coded).most_common()
    assert counts[0][0] == "...."
    assert tuple(word for word, _ in counts[1:4]) == made.expected
    assert counts[3][1] > counts[4][1]


@pytest.mark.parametrize("task", TASKS)
def test_a_length_without_room_is_refused(task: str, source: Source) -> None:
    with pytest.raises(ValueError, match=f"{task}: expected"):
        build(task, source, 300 if task in ("vt", "cwe", "fwe") else 60)


def test_a_text_with_too_few_words_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"niah_multikey: expected a text with at least 8 different words .* got 4"):
        build("niah_multikey", Source(tokenizer, "Four short words were here. They were."), 900)
    words = Source(tokenizer, text.shipped()).words
    for few, wanted, length in ((words[:150], "200", 3000), (words[::10], r"(4\d\d|5\d\d|6\d\d)", 20_000)):
        with pytest.raises(ValueError, match=rf"cwe: expected a text with at least {wanted} diff.* got {len(few)}\."):
            build("cwe", Source(tokenizer, " ".join(few)), length)


def test_the_score_is_the_share_of_the_expected_strings() -> None:
    assert score("It is ABC, and 12.", ("abc", "12", "13", "14")) == 0.5
    assert score("", ("abc",)) == 0.0


def test_prompt_and_answer_take_the_length_together(tokenizer: Any) -> None:
    for trial in exam(tokenizer, list(TASKS), [2048], 1, None, 0).trials:
        assert len(trial.ids) + trial.new_tokens == trial.length == 2048


@pytest.mark.parametrize("tasks", [["qa_1"], ["vt", "vt"], []])
def test_tasks_that_are_none_are_refused(tiny: tuple[Any, Any], tasks: list[str]) -> None:
    with pytest.raises(ValueError, match="ruler: expected"):
        run(*tiny, "dense", tasks, [1024])
