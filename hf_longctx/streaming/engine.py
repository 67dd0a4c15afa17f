"""Turn after turn on one cache: let old spans go, read the turn, answer it within budgets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..cache.cache import LongContextCache
from ..cache.retention import ModalityWindow
from ..models import VisionFacts
from ..turning import AtRead
from .chat import Chat, Encoded, Turn
from .layout import Held, Row, Run
from .reading import Reader
from .sampling import Fetched, Sampler

AHEAD = {"cuda"}
"""Types of devices that are given the next step of an answer before its last word is known: they never wait for us."""


@dataclass(frozen=True)
class Budget:
    """What an answer may cost.

    Args:
        tokens: most tokens.
        seconds: no token is begun after so long, the time to read the turn included; None: no bound.
    """

    tokens: int
    seconds: float | None = None

    def is_over(self, began: float) -> bool:
        """True if the time is spent of an answer that began at `began` on `time.perf_counter`."""
        return self.seconds is not None and time.perf_counter() - began >= self.seconds


@dataclass
class Answer:
    """What the model said to a turn.

    Args:
        ids: tokens, without the one that ends a turn.
        stopped: as `Event`.
    """

    ids: list[int] = field(default_factory=list)
    stopped: Literal["end", "tokens", "time"] = "tokens"


class Engine:
    """Several streams on one model, each in a row of the cache.

    Args:
        model: the patched vision-language model.
        cache: of its plan, empty.
        chat: its turns.
        facts: how it takes pictures and counts positions.
        window: what stays.
        sampler: what it says next.
        rows: streams.
        stops: tokens that end an answer.
        recorded: whether calls are recorded now.
    """

    def __init__(
        self,
        model: Any,
        cache: LongContextCache,
        chat: Chat,
        facts: VisionFacts,
        window: ModalityWindow,
        sampler: Sampler,
        rows: int,
        stops: set[int],
        recorded: Callable[[], bool],
    ) -> None:
        self.model, self.cache, self.chat, self.window = model, cache, chat, window
        self.rows = [Row() for _ in range(rows)]
        self._broken = False
        self.reader, self._sampler, self._stops = Reader(model, cache, facts, recorded), sampler, stops
        self._rotary: AtRead = vars(model.get_decoder().rotary_emb)["forward"]

    @torch.inference_mode()
    def open(self, ids: Sequence[int]) -> None:
        """Read the beginning of the conversation, which stays for good."""
        new = [[row.new("text", 0.0, len(ids), pinned=True)] for row in self.rows]
        with self._whole():
            self._read(Encoded([list(ids) for _ in self.rows], None), new)

    @torch.inference_mode()
    def answer(
        self, turns: Sequence[Turn | None], t: Sequence[float], budget: Budget, pinned: bool = False
    ) -> list[Answer | None]:
        """Read a turn of each row that has one, and answer it.

        Args:
            turns: one for each row.
            t: their ends, in seconds of the stream.
            budget: of each answer.
            pinned: words stay for good.

        Raises:
            ValueError: a turn that does not fit the window, before anything has changed.
            RuntimeError: the turn before was interrupted.
        """
        began = time.perf_counter()
        encoded = self.chat.encode(turns)
        most = len(self.chat.prompt) + budget.tokens + len(self.chat.closing)
        new: list[list[Held]] = []
        for row, turn, ids, end in zip(self.rows, turns, encoded.ids, t, strict=True):
            kind: Literal["text", "vision"] = "vision" if turn is not None and turn.pictures else "text"
            both = [row.new(kind, end, len(ids), pinned), row.new("text", end, most)]
            if kind == "text" and not pinned:
                both[1].number += 1
            new.append([] if turn is None else both)
        stays = [row.stays(self.window, more) for row, more in zip(self.rows, new, strict=True)]
        with self._whole():
            self._let_go(stays)
            logits = self._read(encoded, new)
            return self._say(logits, [turn is not None for turn in turns], budget, began)

    def require_whole(self) -> None:
        """Refuse to go on after a turn that broke off: rows and cache are at odds.

        Raises:
            RuntimeError: there was one.
        """
        if self._broken:
            raise RuntimeError(
                "stream.Session: expected every turn to run to its end; got a session after one that was interrupted. "
                "Start a new session, or load a saved one."
            )

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """A turn: if it breaks off inside, it was the last one."""
        self.require_whole()
        self._broken = True
        yield
        self._broken = False

    # what stays ---------------------------------------------------------------------------------------------------

    def _let_go(self, stays: Sequence[Sequence[bool]]) -> None:
        """Let spans go, in all rows at once."""
        if all(map(all, stays)):
            return
        kept = [row.drop(marks) for row, marks in zip(self.rows, stays, strict=True)]
        counts = [row.tokens for row in self.rows]
        index, shift = (_runs(part, max(counts)).to(self.reader.device) for part in zip(*kept, strict=True))
        alike = len(set(counts)) == 1
        lengths = None if alike else torch.tensor(counts, device=self.reader.device)
        self.cache.keep(index, lengths, shift, lambda pos: self._rotary.real(self.reader.like, pos))

    # reading ------------------------------------------------------------------------------------------------------

    def _read(self, encoded: Encoded, new: Sequence[Sequence[Held]]) -> Tensor:
        """Let the model read what is pending, the turns and the wish for an answer: `[B, V]`, logits of the last."""
        prompt = self.chat.prompt
        parts = [
            [row.pending if more else [], ids, prompt if len(more) > 1 else []]
            for row, ids, more in zip(self.rows, encoded.ids, new, strict=True)
        ]
        ids = [[token for part in row for token in part] for row in parts]
        kinds = None
        if encoded.kinds is not None:
            kinds = [[0] * len(p[0]) + kind + [0] * len(p[2]) for p, kind in zip(parts, encoded.kinds, strict=True)]
        places = self.reader.places(self.rows, ids, kinds, encoded)
        for row, part, more, place in zip(self.rows, parts, new, places, strict=True):
            row.take_in(part, more, place[0].tolist())  # spans begin and end with text, so one axis says it all
        return self.reader.read(self.rows, ids, places, encoded)

    # answering ----------------------------------------------------------------------------------------------------

    def _say(self, logits: Tensor, asked: Sequence[bool], budget: Budget, began: float) -> list[Answer | None]:
        """Token after token, until every row has ended its turn or spent its budget."""
        answers = [Answer() if is_asked else None for is_asked in asked]
        running, device = list(asked), self.reader.device
        ahead = len(self.rows) == 1 and device.type in AHEAD
        draws = self._sampler.begin(self._said, len(self.rows), budget.tokens, device)
        pos = torch.tensor([row.next for row in self.rows], device=device)
        for count in range(1, budget.tokens + 1):
            tokens = draws.next(logits)
            words, spent = Fetched(tokens), count == budget.tokens or budget.is_over(began)
            if ahead and not spent:
                logits = self.reader.step(self.rows, tokens, pos, running)
            picked = words.get()
            spent = spent or (not ahead and budget.is_over(began))
            for i, (row, answer, token) in enumerate(zip(self.rows, answers, picked, strict=True)):
                if answer is not None and running[i]:
                    running[i] = self._hear(row, answer, token, "tokens" if count == budget.tokens else "time", spent)
            if not any(running):
                if ahead and not spent:
                    self.cache.crop(-1)  # the step after the end of the turn
                break
            if not ahead:
                logits = self.reader.step(self.rows, tokens, pos, running)
            pos = pos + 1
        for row, is_asked in zip(self.rows, asked, strict=True):
            if is_asked:
                row.spans[-1].reserved = len(row.spans[-1].ids) + len(row.pending)
        return answers

    def _hear(self, row: Row, answer: Answer, token: int, why: Literal["tokens", "time"], spent: bool) -> bool:
        """Take a token into an answer: True if it goes on, and the model reads it next."""
        if token in self._stops:
            answer.stopped, row.pending = "end", list(self.chat.closing)
            return False
        answer.ids.append(token)
        if spent:
            answer.stopped, row.pending = why, [token, *self.chat.closing]
            return False
        row.spans[-1].ids.append(token)
        row.spans[-1].extent, row.next, row.pending = row.spans[-1].extent + 1, row.next + 1, []
        return True

    def _said(self) -> list[list[int]]:
        """What a repetition penalty remembers: kept words of each stream."""
        kept = [[held.ids for held in row.spans if held.kind == "text"] for row in self.rows]
        return [[token for ids in row for token in ids] for row in kept]


def _runs(rows: Sequence[Sequence[Run]], width: int) -> Tensor:
    """`[B, width]`, int64: runs of each row as `Row.drop` gives them, and the last number again where there are fewer.

    Args:
        rows: runs of each.
        width: of the longest row.
    """
    made = [torch.cat([first + step * torch.arange(count) for first, count, step in runs]) for runs in rows]
    return torch.stack([torch.cat((x, x[-1:].expand(width - len(x)))) for x in made])
