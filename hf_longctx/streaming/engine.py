"""Turn after turn on one cache: let old spans go, read the turn, answer it within budgets."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..cache.cache import LongContextCache
from ..cache.retention import ModalityWindow
from ..models import CACHE, VisionFacts
from ..turning import AtRead
from .chat import Chat, Encoded, Turn
from .layout import Held, Row
from .sampling import Sampler


@dataclass(frozen=True)
class Budget:
    """What an answer may cost.

    Args:
        tokens: most tokens.
        seconds: no token is begun after so long, the time to read the turn included; None: no bound.
    """

    tokens: int
    seconds: float | None = None


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
    ) -> None:
        self.model, self.cache, self.chat, self.window = model, cache, chat, window
        self.rows = [Row() for _ in range(rows)]
        self._broken = False
        self._axes, self._sampler, self._stops = facts.axes, sampler, stops
        decoder = model.get_decoder()
        self._device = model.get_input_embeddings().weight.device
        self._like = torch.empty(0, dtype=decoder.dtype, device=self._device)
        self._rotary: AtRead = vars(decoder.rotary_emb)["forward"]

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
        counts = [len(slots) for slots, _ in kept]
        index, shift = (
            torch.tensor([x + x[-1:] * (max(counts) - len(x)) for x in part], device=self._device)
            for part in zip(*kept, strict=True)
        )
        alike = len(set(counts)) == 1
        lengths = None if alike else torch.tensor(counts, device=self._device)
        self.cache.keep(index, lengths, shift, lambda pos: self._rotary.real(self._like, pos))

    # reading ------------------------------------------------------------------------------------------------------

    def _read(self, encoded: Encoded, new: Sequence[Sequence[Held]]) -> Tensor:
        """Let the model read what is pending, the turns and the wish for an answer: `[B, V]`, logits of the last."""
        prompt = self.chat.prompt
        parts = [
            [row.pending if more else [], ids, prompt if len(more) > 1 else []]
            for row, ids, more in zip(self.rows, encoded.ids, new, strict=True)
        ]
        ids = [[token for part in row for token in part] for row in parts]
        width = max(map(len, ids))
        kinds = None
        if encoded.kinds is not None:
            kinds = [[0] * len(p[0]) + kind + [0] * len(p[2]) for p, kind in zip(parts, encoded.kinds, strict=True)]
        places = self._places(ids, kinds, encoded, width)
        for row, part, more, place in zip(self.rows, parts, new, places, strict=True):
            row.take_in(part, more, place[0].tolist())  # spans begin and end with text, so one axis says it all
        pos = torch.zeros(self._axes, len(ids), width, dtype=torch.int64)
        for number, place in enumerate(places):
            pos[:, number, width - place.shape[1] :] = place
        vision = {name: self._moved(name, x) for name, x in encoded.vision.items() if name != "second_per_grid_ts"}
        return self._forward(_left(ids, width), pos, [len(row) for row in ids], **vision)

    def _places(
        self, ids: Sequence[list[int]], kinds: Sequence[list[int]] | None, encoded: Encoded, width: int
    ) -> list[Tensor]:
        """Where the tokens of each row stand, `[axes, T']`: what the model's routine says of them alone, moved on."""
        if self._axes == 1 or kinds is None:
            return [
                (row.next + torch.arange(len(x))).expand(self._axes, -1) for row, x in zip(self.rows, ids, strict=True)
            ]
        routine = self.model.model.get_rope_index
        known = inspect.signature(routine).parameters
        grids = {name: x for name, x in encoded.vision.items() if name in known}
        some = [i for i, row in enumerate(ids) if row]
        pos, _ = routine(
            input_ids=_left([ids[i] for i in some], width),
            mm_token_type_ids=_left([kinds[i] for i in some], width).int(),
            attention_mask=_left([[1] * len(ids[i]) for i in some], width),
            **grids,
        )
        made = {i: self.rows[i].next + pos[:, at, width - len(ids[i]) :] for at, i in enumerate(some)}
        return [made.get(i, pos[:, 0, :0]) for i in range(len(ids))]

    def _forward(self, ids: Tensor, pos: Tensor, counts: Sequence[int], **vision: Any) -> Tensor:
        """One call: `[B, V]`, logits of the last column.

        Args:
            ids: `[B, T]`, right-aligned.
            pos: `[axes, B, T]`, likewise.
            counts: how many of them each row has.
            **vision: what the vision tower reads.
        """
        rows, width = ids.shape
        mask = None
        if rows > 1:
            new = torch.tensor(counts)
            before = torch.tensor([row.tokens for row in self.rows]) - new  # rows know already what they are to read
            real = torch.arange(width) >= width - new[:, None]
            mask = torch.cat((torch.arange(self.cache.ledger.columns) < before[:, None], real), 1).to(self._device)
        out = self.model(
            input_ids=ids.to(self._device),
            attention_mask=mask,
            position_ids=(pos if self._axes == 3 else pos[0]).to(self._device),
            **{CACHE: self.cache},
            use_cache=True,
            logits_to_keep=1,
            **vision,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _moved(self, name: str, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(self._device, self._like.dtype if x.is_floating_point() else x.dtype)

    # answering ----------------------------------------------------------------------------------------------------

    def _say(self, logits: Tensor, asked: Sequence[bool], budget: Budget, began: float) -> list[Answer | None]:
        """Token after token, until every row has ended its turn or spent its budget."""
        answers = [Answer() if is_asked else None for is_asked in asked]
        running = [answer is not None for answer in answers]
        while any(running):
            picked = self._sampler.next(logits, self._said)
            late = budget.seconds is not None and time.perf_counter() - began >= budget.seconds
            for i, (row, answer, token) in enumerate(zip(self.rows, answers, picked, strict=True)):
                if answer is None or not running[i]:
                    continue
                if token in self._stops:
                    answer.stopped, row.pending, running[i] = "end", list(self.chat.closing), False
                    continue
                answer.ids.append(token)
                row.pending = [token]
                if late or len(answer.ids) >= budget.tokens:
                    answer.stopped = "tokens" if len(answer.ids) >= budget.tokens else "time"
                    row.pending, running[i] = [token, *self.chat.closing], False
            if any(running):
                logits = self._step(picked, running)
        for row, is_asked in zip(self.rows, asked, strict=True):
            if is_asked:
                row.spans[-1].reserved = len(row.spans[-1].ids) + len(row.pending)
        return answers

    def _step(self, picked: Sequence[int], running: Sequence[bool]) -> Tensor:
        """One more token of each row that is not done."""
        pos = torch.tensor([row.next for row in self.rows]).view(1, -1, 1).expand(self._axes, -1, 1)
        for row, goes_on in zip(self.rows, running, strict=True):
            if goes_on:
                row.spans[-1].ids += row.pending
                row.spans[-1].extent += 1
                row.next, row.pending = row.next + 1, []
        return self._forward(torch.tensor(picked)[:, None], pos, [int(goes_on) for goes_on in running])

    def _said(self) -> list[list[int]]:
        """What a repetition penalty remembers: kept words of each stream."""
        kept = [[held.ids for held in row.spans if held.kind == "text"] + [row.pending] for row in self.rows]
        return [[token for ids in row for token in ids] for row in kept]


def _left(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """`[B, width]`, int64: rows right-aligned, with zeros before."""
    return torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
