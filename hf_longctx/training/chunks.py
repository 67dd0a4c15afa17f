"""Long transcribed videos cut into short overlapping pieces, so that full attention sees what streaming leaves.

Paper: StreamingVLM (arXiv:2510.09608) §3.2, overlapped-chunk fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

WINDOW_S = 24.0
OVERLAP_S = 12.0
QUERY = "Commentate on this match."


@dataclass(frozen=True)
class Word:
    """A word of a transcript, in seconds of its video."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Asked:
    """A question in a stream, and its answer.

    Attributes:
        tag: whatever the file has in the first place.
        t: seconds of the video.
        question: words of the user.
        answer: words of the model.
    """

    tag: Any
    t: float
    question: str
    answer: str


@dataclass(frozen=True)
class Chunk:
    """One piece to train on.

    Attributes:
        video: path of the file.
        start: seconds of the video at which the piece begins.
        end: and ends.
        query: the user's wish.
        previous: what was said before the piece.
        words: what is said in it, by start.
        asked: questions in it, by time.

    Raises:
        ValueError: a piece without length, or a word or question outside of it or out of order.
    """

    video: str
    start: float
    end: float
    query: str
    previous: str
    words: tuple[Word, ...]
    asked: tuple[Asked, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.end) and 0 <= self.start < self.end):
            raise ValueError(
                f"chunk of {self.video}: expected 0 <= start < end in seconds; got {self.start} and {self.end}."
            )
        for what, times in (("word", [w.start for w in self.words]), ("question", [a.t for a in self.asked])):
            inside = all(self.start <= t < self.end for t in times)
            if not inside or times != sorted(times):
                raise ValueError(
                    f"chunk of {self.video}: expected the times of each {what} in order and from {self.start:g} to "
                    f"{self.end:g} s; got {times[:8]}{'...' if len(times) > 8 else ''}. Sort or cut them."
                )

    def to_row(self) -> dict[str, Any]:
        """As columns that a table can hold: numbers and texts in lists of their own."""
        words, asked = self.words, self.asked
        return {
            **{name: value for name, value in asdict(self).items() if name not in ("words", "asked")},
            "word_start": [word.start for word in words],
            "word_end": [word.end for word in words],
            "word": [word.text for word in words],
            "asked_t": [each.t for each in asked],
            "question": [each.question for each in asked],
            "answer": [each.answer for each in asked],
        }

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> Chunk:
        """What `to_row` gave; the tags of questions are None."""
        words = zip(row["word_start"], row["word_end"], row["word"], strict=True)
        asked = zip(row["asked_t"], row["question"], row["answer"], strict=True)
        return Chunk(
            **{name: row[name] for name in ("video", "start", "end", "query", "previous")},
            words=tuple(Word(*each) for each in words),
            asked=tuple(Asked(None, *each) for each in asked),
        )


@dataclass(frozen=True)
class OverlappedChunks:
    """Cuts transcripts into pieces that overlap; `dataset.map(chunks, batched=True, remove_columns=...)` takes it.

    Args:
        window_s: seconds of a piece.
        overlap_s: seconds that a piece shares with the one before.
        min_words: pieces with fewer are left out; None is two a second, as in the paper.

    Raises:
        ValueError: an overlap as long as the piece, or a length that is none.
    """

    window_s: float = WINDOW_S
    overlap_s: float = OVERLAP_S
    min_words: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.window_s) and 0 <= self.overlap_s < self.window_s):
            raise ValueError(
                f"OverlappedChunks: expected 0 <= overlap_s < window_s; got {self.overlap_s} and {self.window_s}. "
                "The paper has 12 and 24."
            )
        if self.min_words is not None and self.min_words < 0:
            raise ValueError(f"OverlappedChunks: expected min_words >= 0; got {self.min_words}.")

    def cut(self, video: str, duration: float, words: Sequence[Word], query: str = QUERY) -> list[Chunk]:
        """The pieces of one video.

        Args:
            video: path of the file.
            duration: its seconds; a last piece that would reach beyond is left out.
            words: its transcript; sorted here.
            query: the user's wish.

        Returns:
            Pieces at 0, `window_s - overlap_s`, ..., each with all that was said before it as `previous`.
        """
        ordered = sorted(words, key=lambda word: (word.start, word.end))
        least = 2 * self.window_s if self.min_words is None else self.min_words
        made: list[Chunk] = []
        number, start = 0, 0.0
        while start + self.window_s <= duration + 1e-6:
            end = start + self.window_s
            inside = tuple(word for word in ordered if start <= word.start < end)
            if len(inside) >= least:
                before = " ".join(word.text for word in ordered if word.start < start)
                made.append(Chunk(video, start, end, query, before, inside))
            number += 1
            start = number * (self.window_s - self.overlap_s)
        return made

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Rows of transcripts to rows of pieces.

        Args:
            batch: columns `video`, `duration`, `word_start`, `word_end`, `word` (lists in each row), and maybe `query`.

        Returns:
            Columns as of `Chunk.to_row`; more or fewer rows than went in.
        """
        rows: list[dict[str, Any]] = []
        for index, video in enumerate(batch["video"]):
            each = zip(*(batch[name][index] for name in ("word_start", "word_end", "word")), strict=True)
            query = batch["query"][index] if "query" in batch else QUERY
            cut = self.cut(video, batch["duration"][index], [Word(*word) for word in each], query)
            rows += [chunk.to_row() for chunk in cut]
        return {name: [row[name] for row in rows] for name in (*_COLUMNS, *_LISTS)}


_COLUMNS = ("video", "start", "end", "query", "previous")
_LISTS = ("word_start", "word_end", "word", "asked_t", "question", "answer")


@dataclass(frozen=True)
class Second:
    """One round of a piece: what the user says, and what the model should.

    Attributes:
        start: seconds of the video.
        end: likewise.
        question: of the user; empty if there is none.
        reply: of the model.
    """

    start: float
    end: float
    question: str
    reply: str


def seconds(chunk: Chunk, round_s: float = 1.0, pause: str = " ...") -> list[Second]:
    """A piece second by second, pictures and words interleaved as a stream has them.

    Args:
        chunk: the piece.
        round_s: seconds of a round.
        pause: ends every reply, and is all of a silent one.

    Returns:
        Rounds from the start to the end; the last one may be shorter.
    """
    count = math.ceil((chunk.end - chunk.start) / round_s - 1e-6)
    edges = [chunk.start + number * round_s for number in range(count)] + [chunk.end]
    made = []
    for start, end in pairwise(edges):
        said = " ".join(word.text for word in chunk.words if start <= word.start < end)
        asked = [each for each in chunk.asked if start <= each.t < end]
        answers = "\n".join(each.answer for each in asked)
        reply = "\n".join(part for part in (answers, said) if part)
        made.append(Second(start, end, " ".join(each.question for each in asked), reply + pause))
    return made


def capped(text: str, tokenizer: Any, sink: int, window: int) -> str:
    """The first and the last tokens of a text, as text; all of it if it is shorter.

    Args:
        text: what was said before.
        tokenizer: a fast tokenizer.
        sink: tokens at the start.
        window: tokens at the end.

    Raises:
        ValueError: a size below zero.
    """
    if sink < 0 or window < 0:
        raise ValueError(f"capped: expected sink and window of at least 0 tokens; got {sink} and {window}.")
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(spans) <= sink + window:
        return text
    head, tail = text[: spans[sink][0]], text[spans[len(spans) - window][0] :] if window else ""
    return " ".join(part for part in (head.strip(), tail.strip()) if part)
