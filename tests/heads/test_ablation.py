"""Tasks under conditions: rows, means, files, and what the tasks themselves are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hf_longctx.evals import text
from hf_longctx.heads import ablation, readouts
from hf_longctx.heads.ablation import Condition, How, Row, conditions, summarize
from hf_longctx.heads.scores import HeadScores

from ..integration.snapshot import differences, snapshot

SCORES = HeadScores({(n, h): (float(10 * h + n),) for n in range(2) for h in range(4)})


def ablate(
    tiny: tuple[Any, Any], out: Path | None = None, tasks: tuple[str, ...] = ("needle", "qa"), **how: Any
) -> Any:
    exams = readouts.exams(tiny[1], tasks, None, [330], 2, 1, 0)
    asked = conditions(SCORES, [4, 4], 2, range(2))
    return ablation.run(*tiny, exams, asked, text.shipped(), How(batch=5, chunk=128, out=out, **how))


def test_every_task_runs_under_every_condition_on_the_same_prompts(tiny: tuple[Any, Any]) -> None:
    before = snapshot(tiny[0])
    rows = ablate(tiny)
    assert differences(before, snapshot(tiny[0])) == []
    names = ["whole", "top 2", "random 2 seed 0", "random 2 seed 1"]
    assert [row.condition for row in rows] == [name for name in names for _ in range(12)]
    assert [row.task for row in rows[:12]] == ["passkey"] * 2 + ["qa"] * 10
    for start in (12, 24, 36):
        assert [row.seed for row in rows[start : start + 12]] == [row.seed for row in rows[:12]]
    answers = [tuple(row.answer for row in rows[start : start + 12]) for start in (0, 12, 24, 36)]
    assert len(set(answers)) == 4


def test_an_interrupted_run_goes_on_and_other_heads_are_refused(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    whole = ablate(tiny, tmp_path, ("needle",))
    path = tmp_path / "ablate.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + b"{")
    assert ablate(tiny, tmp_path, ("needle",), resume=True) == whole
    assert len(path.read_bytes().splitlines()) == 8
    with pytest.raises(ValueError, match="mode='uniform'; got 'zero'"):
        ablate(tiny, tmp_path, ("needle",), resume=True, mode="uniform")
    told = json.loads((tmp_path / "run_meta.json").read_text())["ablate"]["settings"]
    assert told["heads"]["top 2"] == ["1-3", "0-3"]


def test_what_cannot_be_is_refused_before_anything_runs(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    before = snapshot(tiny[0])
    with pytest.raises(ValueError, match="expected a mode among"):
        ablate(tiny, tmp_path, mode="half")
    assert list(tmp_path.iterdir()) == []
    assert differences(before, snapshot(tiny[0])) == []
    with pytest.raises(ValueError, match="expected a head of the model"):
        conditions(SCORES, [4], 2, [])


@pytest.mark.parametrize(("phases", "chunk"), [(("prefill", "decode"), 512), (("decode",), 330)])
def test_prompts_are_read_whole_where_the_border_between_phases_matters(
    tiny: tuple[Any, Any], tmp_path: Path, phases: tuple[str, ...], chunk: int
) -> None:
    exams = readouts.exams(tiny[1], ["needle"], None, [330], 1, 1, 0)
    ablation.run(*tiny, exams, [Condition("whole", ())], "", How(phases=phases, out=tmp_path))
    assert json.loads((tmp_path / "run_meta.json").read_text())["ablate"]["settings"]["chunk"] == chunk


def rows_of(condition: str, task: str, *scores: float) -> list[Row]:
    return [Row(condition, task, 9, None, i, 0, [], "", score) for i, score in enumerate(scores)]


def test_means_and_drops_are_those_of_the_rows(tmp_path: Path) -> None:
    rows = rows_of("whole", "qa", 1, 0.5) + rows_of("top 2", "qa", 0.25, 0) + rows_of("random 2 seed 0", "qa", 1, 1)
    assert [(each["score"], each["drop"]) for each in summarize(rows)] == [(0.75, 0), (0.125, 0.625), (1, -0.25)]
    console = Console(record=True, width=100, file=(tmp_path / "said").open("w"))
    ablation.publish(rows, "title", tmp_path, console)
    said = console.export_text()
    assert "75" in said
    assert "12 (-62)" in said
    assert "100 (+25)" in said
    assert json.loads((tmp_path / "ablate_summary.json").read_text())[1]["drop"] == 0.625
    assert (tmp_path / "ablate.png").stat().st_size > 5_000


# tasks ---------------------------------------------------------------------------------------------------------------


def test_an_answer_to_a_question_stands_in_the_text_once_beside_others(tiny: tuple[Any, Any]) -> None:
    exam = readouts.questions(tiny[1], text.shipped(), {}, [400, 500], 3, 0)
    trials = list(exam.trials)
    assert [len(trial.ids) for trial in trials] == [400] * 3 + [500] * 3
    for trial in trials:
        prompt = tiny[1].decode(trial.ids)
        assert prompt.count(trial.expected[0]) == 1
        assert sum(f"lives {place}." in prompt for place in readouts._PLACES) == 4
        who = prompt.rsplit("Where does ", 1)[1].split(" live?")[0]
        assert f"{who[0].upper()}{who[1:]} lives {trial.expected[0]}." in prompt
        assert exam.score(f" {trial.expected[0]}. And more", trial.expected) == 1
    assert len({trial.expected for trial in trials}) > 1


@pytest.mark.parametrize("people", [2, 4])
def test_a_sum_is_right_and_its_steps_lead_there(tiny: tuple[Any, Any], people: int) -> None:
    exam = readouts.sums(tiny[1], text.shipped(), {}, [2200], 3, 0, people)
    for trial in exam.trials:
        assert len(trial.ids) == 2200
        *shots, asked = tiny[1].decode(trial.ids).split("Question: ")[1:]
        assert len(shots) == 8
        for shot in shots:
            assert readouts.concludes(shot.split("Answer: ")[1], reckon(shot))
        assert asked.endswith("Answer:")
        assert trial.expected == (reckon(asked),)


def reckon(question: str) -> str:
    have: dict[str, int] = {}
    for fact in question.split(" How many")[0].rstrip(".").split(". "):
        words = fact.split()
        have[words[0]] = int(words[2]) + (have[words[-1]] if "than" in words else 0)
    return str(have[question.split("How many pears does ")[1].split()[0]])


@pytest.mark.parametrize(
    ("answer", "right"),
    [("Ada has 2. The answer is 12.\nThe answer is 3", False), (" The answer is 3.", True), ("3", False), ("", False)],
)
def test_the_first_line_concludes(answer: str, right: bool) -> None:
    assert readouts.concludes(answer, "3") is right


@pytest.mark.parametrize(
    ("answer", "score"), [("near the gate. Or not", 6 / 7), ("NEAR the copper gate\n", 1), ("far", 0), ("", 0)]
)
def test_f1_is_that_of_the_words_of_the_first_sentence(answer: str, score: float) -> None:
    assert readouts.f1(answer, "near the copper gate") == pytest.approx(score)


def test_tasks_that_are_none_and_lengths_without_room_are_refused(tiny: tuple[Any, Any]) -> None:
    for tasks in (["sing"], ["qa", "qa"]):
        with pytest.raises(ValueError, match="tasks: expected each of needle, qa, cot once at most"):
            readouts.exams(tiny[1], tasks, None, [300], 1, 1, 0)
    with pytest.raises(ValueError, match="tasks: expected some"):
        readouts.exams(tiny[1], [], None, [300], 1, 1, 0)
    with pytest.raises(ValueError, match="trials: expected at least 1; got 0"):
        readouts.exams(tiny[1], ["qa"], None, [300], 1, 0, 0)
    with pytest.raises(ValueError, match="heads ablate, batch: expected at least 1; got 0"):
        How(batch=0)
    with pytest.raises(ValueError, match="cot: expected a length of at least"):
        list(readouts.sums(tiny[1], text.shipped(), {}, [50], 1, 0).trials)
