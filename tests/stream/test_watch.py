"""A stream from end to end around a session that only counts: files, questions, and every kind of end."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from hf_longctx.streaming.captions import Captions
from hf_longctx.streaming.events import Event
from hf_longctx.streaming.frames import Frame
from hf_longctx.streaming.source import frames
from hf_longctx.streaming.subtitles import read
from hf_longctx.streaming.watch import Question, Summary, closing_lines, watch

from .films import film, grey, number


class Counting:
    """Says which pictures it saw in each second; silent in odd ones."""

    def __init__(self) -> None:
        self.t, self.asked = 0.0, []

    def run(self, source: Iterable[Frame]) -> Iterator[Event]:
        held: list[Frame] = []
        for frame in source:
            held.append(frame)
            if len(held) == 2:
                self.t = held[0].t + 1
                text = " ".join(str(number(each.image)) for each in held) if held[0].t % 2 == 0 else ""
                yield Event(held[0].t, self.t, text, frames=2, latency_s=self.t / 100)
                held = []

    def ask(self, question: str) -> Event:
        self.asked.append((self.t, question))
        return Event(self.t, self.t, f"{question} Yes.", kind="answer")


def run(
    folder: Path, source: object, questions: tuple[str, ...] = (), terminal: bool = False
) -> tuple[Counting, Summary, str]:
    session, summary, console = (
        Counting(),
        Summary(),
        Console(file=io.StringIO(), force_terminal=terminal, width=100),
    )
    captions = Captions(folder / "a.srt", folder / "a.vtt", folder / "a.jsonl")
    asked = [Question.read(each) for each in questions]
    try:
        watch(session, source, captions, asked, summary, console)
    finally:
        run.lines = closing_lines(summary, source, captions)
    return session, summary, console.file.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_a_video_becomes_three_valid_files(tmp_path: Path, terminal: bool) -> None:
    source = frames(film(tmp_path / "greys.mkv", 30, rate=10), fps=2)
    _, summary, shown = run(tmp_path, source, terminal=terminal)
    assert [(cue.start, cue.end, cue.text) for cue in read(tmp_path / "a.srt")] == [(0, 1, "0 5"), (2, 3, "20 25")]
    assert read(tmp_path / "a.vtt") == read(tmp_path / "a.srt") == read(tmp_path / "a.jsonl")
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 3
    assert (summary.events, summary.t) == (3, 3)
    assert re.search(r"00:00:02.*  .*20 25", shown)


def test_questions_are_asked_in_their_round_or_at_the_end(tmp_path: Path) -> None:
    session, summary, _ = run(
        tmp_path, frames([grey(n) for n in range(8)], fps=2), ("99=Late?", "1.5=Now?", "0=First?")
    )
    assert session.asked == [(1, "First?"), (2, "Now?"), (4, "Late?")]
    assert [cue.text for cue in read(tmp_path / "a.jsonl")] == ["0 1", "First? Yes.", "Now? Yes.", "4 5", "Late? Yes."]
    assert (summary.rounds, summary.events) == (4, 7)


@pytest.mark.parametrize("error", [KeyError("lens cap"), KeyboardInterrupt()])
def test_an_exception_of_the_source_keeps_what_was_said(tmp_path: Path, error: BaseException) -> None:
    def pictures() -> Iterator[object]:
        yield from (grey(n) for n in range(6))
        raise error

    with pytest.raises(type(error)):
        run(tmp_path, frames(pictures(), fps=2))
    assert [cue.text for cue in read(tmp_path / "a.srt")] == ["0 1", "4 5"]
    assert "3 s of stream, 6 frames (none lost; a full queue would make the source wait)" in run.lines[0]
    assert run.lines[2].endswith("a.srt: 2 captions")


def test_an_exception_of_the_session_closes_the_source(tmp_path: Path) -> None:
    class Failing(Counting):
        def ask(self, question: str) -> Event:
            raise RuntimeError("no answer")

    source = frames((grey(n % 30) for n in range(1000)), fps=2)
    with Captions(tmp_path / "a.srt") as captions, pytest.raises(RuntimeError, match="no answer"):
        watch(Failing(), source, captions, [Question(0, "Who?")], Summary(), Console(quiet=True))
    assert list(source) == []
    assert len(read(tmp_path / "a.srt")) == 1


def test_percentiles() -> None:
    summary = Summary()
    assert summary.percentile_ms(50) == 0
    summary.latencies_s += [n / 1000 for n in range(100, 0, -1)]
    assert (summary.percentile_ms(50), summary.percentile_ms(99)) == (51, 100)


@pytest.mark.parametrize("written", ["Who?", "x=Who?", "1=", "-1=Who?", "nan=Who?", ""])
def test_bad_questions(written: str) -> None:
    with pytest.raises(ValueError, match="SECONDS=QUESTION"):
        Question.read(written)


def test_a_question_may_have_signs() -> None:
    assert Question.read("1.5=2=2?") == Question(1.5, "2=2?")
