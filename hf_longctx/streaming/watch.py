"""One stream from end to end: frames into a session, its events into files and onto the screen."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from .captions import Captions, clock
from .events import Event
from .source import FrameSource


class Speaker(Protocol):
    """What is needed of a session here."""

    def run(self, frames: FrameSource) -> Iterable[Event]:
        """Events, round by round."""

    def ask(self, question: str) -> Event:
        """The answer to a question, now."""


@dataclass(frozen=True)
class Question:
    """What to ask, and when.

    Attributes:
        t: seconds of the stream.
        text: the question.
    """

    t: float
    text: str

    @classmethod
    def read(cls, written: str) -> Question:
        """From `SECONDS=QUESTION`; raises ValueError for anything else."""
        head, _, text = written.partition("=")
        try:
            t = float(head)
        except ValueError:
            t = math.nan
        if not (math.isfinite(t) and t >= 0 and text.strip()):
            raise ValueError(f"--ask: expected SECONDS=QUESTION; got '{written}'. For example --ask '12=Who scored?'")
        return cls(t, text.strip())


@dataclass
class Summary:
    """What a stream came to.

    Attributes:
        events: all of them, answers and silent rounds too.
        rounds: without answers.
        latencies_s: of the last 4096 rounds.
        t: seconds of the stream that were seen.
    """

    events: int = 0
    rounds: int = 0
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
    t: float = 0.0

    def add(self, event: Event) -> None:
        """Count one event."""
        self.events += 1
        self.t = max(self.t, event.t_end)
        if event.kind == "caption":
            self.rounds += 1
            self.latencies_s.append(event.latency_s)

    def percentile_ms(self, percent: float) -> float:
        """Milliseconds within which so many percent of the rounds were done; 0 before the first."""
        ordered = sorted(self.latencies_s)
        return 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


def watch(
    session: Speaker,
    source: FrameSource,
    captions: Captions,
    questions: list[Question],
    summary: Summary,
    console: Console,
) -> None:
    """Run a stream until it ends, fails or is interrupted; what was written until then is valid and stays.

    Args:
        session: takes the frames.
        source: gives them; closed at the end.
        captions: written event by event; closed at the end.
        questions: each asked after the round in which its time lies, or after the last round.
        summary: counted up event by event.
        console: where lines go, and a bar if somebody watches.

    Raises:
        Exception: whatever the source, the session or a file raised.
    """
    waiting = sorted(questions, key=lambda question: question.t)
    with captions, source, _bar(console) as bar:
        task = bar.add_task("", total=source.duration, of="", said="")

        def take(event: Event) -> None:
            captions.add(event)
            summary.add(event)
            if event.text.strip():
                bar.console.print(_said(event), soft_wrap=True)
            _advance(bar, task, summary, source)

        for event in session.run(source):
            take(event)
            while waiting and waiting[0].t < event.t_end:
                take(session.ask(waiting.pop(0).text))
        for question in waiting:
            take(session.ask(question.text))


def _bar(console: Console) -> Progress:
    """Stream time, of all where that is known, and what the rounds take."""
    return Progress(
        BarColumn(),
        TextColumn("{task.fields[of]}"),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _advance(bar: Progress, task: TaskID, summary: Summary, source: FrameSource) -> None:
    dropped = f", {source.counts.dropped} frames dropped" if source.when_full == "drop" else ""
    of = f"{summary.t:.0f} s" + (f" of {source.duration:.0f} s" if source.duration is not None else "")
    bar.update(task, completed=summary.t, of=of, said=f"{summary.percentile_ms(50):.0f} ms a round{dropped}")


def _said(event: Event) -> Text:
    """One line: the time, then the text."""
    start = clock(event.t, ".")[:-4]
    return Text.assemble((start, "dim"), "  ", (" ".join(event.text.split()), "bold" if event.kind == "answer" else ""))


def closing_lines(summary: Summary, source: FrameSource, captions: Captions) -> list[str]:
    """What to say at the end: the stream, its frames, its rounds, its files."""
    counts = source.counts
    lost = [f"{n} {what}" for n, what in ((counts.dropped, "dropped"), (counts.damaged, "damaged packets")) if n]
    lines = [
        f"{summary.t:g} s of stream, {counts.delivered} frames ({', '.join(lost) or 'none lost'}; "
        f"a full queue would {'drop the oldest' if source.when_full == 'drop' else 'make the source wait'})",
        f"{summary.rounds} rounds: p50 {summary.percentile_ms(50):.0f} ms, p99 {summary.percentile_ms(99):.0f} ms",
    ]
    return lines + [f"{file.path}: {file.written} captions" for file in captions.files]
