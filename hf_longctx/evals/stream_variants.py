"""What a streaming session is compared with: no window, positions that grow, and everything encoded anew each round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from ..cache.retention import ModalityWindow
from ..models import CACHE, decoder_of, inspect_model
from ..streaming.chat import Chat, Turn
from ..streaming.events import Event
from ..streaming.frames import Frame
from ..streaming.layout import Held, Row, Run
from ..streaming.rounds import rounds
from ..streaming.session import Session
from ..streaming.settings import QUERY, TIME

_ALL = 10**9  # tokens or seconds: a window that nothing ever leaves


@dataclass(frozen=True)
class Sizes:
    """Arguments of `Session` of the same names."""

    window_s: float = 16.0
    text_sink: int = 512
    text_window: int = 512
    max_new_tokens: int = 20
    query: str = QUERY


class Runner(Protocol):
    """A context manager that comments on frames."""

    def __enter__(self) -> Any:
        """Begin."""

    def __exit__(self, *exception: object) -> None:
        """Give the model back as it was."""

    def run(self, frames: Iterable[Frame]) -> Iterator[Event]:
        """Events, round by round."""

    def held(self) -> tuple[int, int]:
        """Tokens and bytes of keys and values that are stored now."""


class _Session(Session):
    """A session, with what it holds as a pair."""

    def held(self) -> tuple[int, int]:
        """Tokens and bytes that are stored now."""
        stats = self.stats
        return stats.tokens_held[0], stats.bytes_held


class _Native(_Session):
    """A session whose kept tokens stay where they once stood: positions grow with the stream, and have gaps."""

    def __enter__(self) -> _Native:
        super().__enter__()
        self.engine.rows = [_Unmoved(**vars(row)) for row in self.engine.rows]
        return self


class _Unmoved(Row):
    """A row in which nothing moves up when spans go."""

    def drop(self, stays: Sequence[bool]) -> tuple[list[Run], list[Run]]:
        """Slots of the tokens that stay, and no moves."""
        before = self.next
        slots, _ = super().drop(stays)
        self.next = before
        return slots, [(0, count, 0) for _, count, _ in slots]


class Recompute:
    """The stock model over the very same window, encoded anew each round: pictures, text and all.

    It is the paper's baseline, a sliding window with overlap (arXiv:2510.09608, §4.3): right, and slow.

    Args:
        model: an unpatched vision-language model.
        processor: its own.
        sizes: of the window.
    """

    def __init__(self, model: Any, processor: Any, sizes: Sizes) -> None:
        facts = inspect_model(model).vision
        assert facts is not None
        _, self._model = decoder_of(model)
        self._chat, self._sizes = Chat(self._model, processor, facts), sizes
        self._window = ModalityWindow(sizes.text_sink, sizes.text_window, sizes.window_s)
        self._row = Row()
        self._turns: dict[int, Turn] = {}
        self._opening = Held("text", 0, 0.0, True, self._chat.opening(None, sizes.query))
        self._held = (0, 0)

    def __enter__(self) -> Recompute:
        self._row, self._turns = Row([self._opening]), {}
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def held(self) -> tuple[int, int]:
        """Tokens and bytes that were stored at the end of the last round; between rounds there is nothing."""
        return self._held

    def run(self, frames: Iterable[Frame]) -> Iterator[Event]:
        """Events, round by round."""
        for number, one in enumerate(rounds(frames, 1.0, 0.0)):
            began = time.perf_counter()
            turn = Turn(TIME.format(one.t, one.t_end), one.pictures, one.times, one.t_end - one.t)
            ids, stopped = self._answer(turn, one.t_end)
            took = time.perf_counter() - began
            text, count = self._chat.decode(ids), len(one.pictures)
            yield Event(one.t, one.t_end, text, "caption", 0, number, count, len(ids), took, stopped)

    @torch.inference_mode()
    def _answer(self, turn: Turn, end: float) -> tuple[list[int], Literal["end", "tokens"]]:
        chat, row, most = self._chat, self._row, self._sizes.max_new_tokens
        (new,) = chat.encode([turn]).ids
        seen = row.new("vision", end, len(new))
        said = row.new("text", end, len(chat.prompt) + most + len(chat.closing))
        stays = self._window.keep([held.span for held in (*row.spans, seen, said)])
        row.drop(stays[: len(row.spans)])
        self._turns[seen.number] = turn
        row.add(seen)
        seen.ids = new
        inputs = self._inputs()
        out: Any = self._model.generate(**inputs, max_new_tokens=most, return_dict_in_generate=True)  # type: ignore[operator]
        length = inputs["input_ids"].shape[1]
        answer = out.sequences[0, length:].tolist()
        layers = getattr(out, CACHE).layers
        self._held = length + len(answer) - 1, sum(x.nbytes for layer in layers for x in (layer.keys, layer.values))
        given: Any = self._model.generation_config
        ends = given.eos_token_id
        stops = {*([ends] if isinstance(ends, int) else ends or []), *chat.closing[:1]}
        words = answer[: next((n for n, token in enumerate(answer) if token in stops), most)]
        row.add(said)
        said.ids = [*chat.prompt, *words, *chat.closing]
        return words, "end" if len(words) < len(answer) else "tokens"

    def _inputs(self) -> dict[str, Any]:
        """All that is kept, from pixels and words."""
        spans, prompt = self._row.spans, self._chat.prompt
        kept = [held.number for held in spans if held.kind == "vision"]
        self._turns = {number: self._turns[number] for number in kept}
        encoded = self._chat.encode([self._turns[number] for number in kept])
        ids = [token for held in spans for token in held.ids] + prompt
        made: dict[str, Any] = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        if encoded.kinds is not None:
            of_turns = iter(encoded.kinds)
            parts = [next(of_turns) if held.kind == "vision" else [0] * len(held.ids) for held in spans]
            kinds = [kind for part in parts for kind in part] + [0] * len(prompt)
            made["mm_token_type_ids"] = torch.tensor([kinds]).int()
        device, dtype = self._model.device, self._model.dtype
        return {
            name: x.to(device, dtype if x.is_floating_point() else None) if isinstance(x, torch.Tensor) else x
            for name, x in {**made, **encoded.vision}.items()
        }


def _session(kind: type[_Session], model: Any, processor: Any, sizes: Sizes, everything: bool = False) -> _Session:
    return kind(
        model,
        processor,
        window_s=_ALL if everything else sizes.window_s,
        text_sink=sizes.text_sink,
        text_window=_ALL if everything else sizes.text_window,
        max_new_tokens=sizes.max_new_tokens,
        query=sizes.query,
    )


VARIANTS: dict[str, Callable[[Any, Any, Sizes], Runner]] = {
    "window": lambda model, processor, sizes: _session(_Session, model, processor, sizes),
    "recompute": Recompute,
    "full": lambda model, processor, sizes: _session(_Session, model, processor, sizes, everything=True),
    "native": lambda model, processor, sizes: _session(_Native, model, processor, sizes),
}
"""By name: the window with contiguous positions, the same encoded anew, nothing let go, positions that grow."""
