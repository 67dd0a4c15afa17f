"""A live conversation about endless video: frames in, events out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import zip_longest
from threading import RLock
from typing import Any

import torch
from transformers import GenerationConfig

from ..cache.cache import LongContextCache
from ..methods import StreamingVLM
from ..models import decoder_of, inspect_model
from ..patch import patch, state_of, unpatch
from ..session import load_session as load_cache
from ..session import read_notes
from .chat import Chat, Turn
from .engine import Answer, Budget, Engine
from .events import Event
from .frames import Frame
from .layout import Row
from .rounds import Round, rounds
from .sampling import Sampler
from .settings import QUERY, TIME, Settings
from .stats import Meter, Stats


class Session:
    """Rounds of frames are read as they come and commented on; what leaves the windows is let go.

    A context manager: the model is patched inside, and given back as it was. Each round encodes its own frames only,
    and costs the same however long the stream.

    Paper: StreamingVLM (arXiv:2510.09608) §3. Differs: `cache/retention.py`; one session may hold several streams,
    batched on one model.

    Args:
        model: a loaded vision-language model (`models.VISION` lists the families).
        processor: its own, with its chat template.
        window_s: how long pictures stay, in seconds of the stream.
        text_sink: first tokens of text that stay, pinned ones included.
        text_window: last tokens of text that stay.
        vision_tokens: most tokens of pictures that stay; None: no bound of its own.
        query: what the user wishes; pinned.
        system: the system's words; None: the template's.
        round_s: seconds of a round.
        max_new_tokens: most tokens of an answer.
        round_budget_s: no token of a round is begun after so many seconds; None: no bound.
        generation: how tokens are drawn; None: as the model's own settings say.
        seed: of the draws.
        streams: how many there are.

    Raises:
        UnsupportedError: a model or a chat template that cannot be streamed, and why.
        ValueError: sizes that do not fit: a window below a round, a text sink below the query.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        window_s: float = 16.0,
        text_sink: int = 512,
        text_window: int = 512,
        vision_tokens: int | None = None,
        query: str = QUERY,
        system: str | None = None,
        round_s: float = 1.0,
        max_new_tokens: int = 20,
        round_budget_s: float | None = None,
        generation: GenerationConfig | None = None,
        seed: int = 0,
        streams: int = 1,
    ) -> None:
        self.method = StreamingVLM(window_s, text_sink, text_window, vision_tokens)
        self.settings = Settings(query, system, round_s, max_new_tokens, round_budget_s, seed, streams)
        self.settings.check_window(window_s)
        _, self._base = decoder_of(model)
        facts = inspect_model(model)
        self.method.plan(facts)
        assert facts.vision is not None
        self.model, self._vision = model, facts.vision
        self._chat = Chat(self._base, processor, facts.vision)
        self._opening = self._chat.opening(system, query)
        self._check_text(max_new_tokens)
        given: Any = generation or self._base.generation_config
        ends = given.eos_token_id
        self._stops = {*([ends] if isinstance(ends, int) else ends or []), *self._chat.closing[:1]}
        pictures = [getattr(self._base.config, name, None) for name in ("image_token_id", "video_token_id")]
        self._sampler = Sampler(given, seed, [token for token in pictures if isinstance(token, int)])
        self._budget = Budget(max_new_tokens, round_budget_s)
        self._lock = RLock()
        self._engine: Engine | None = None
        self._before: Any = None
        self._meter = Meter.of(streams)
        self._sources: list[Any] = []
        self._paused = False
        self.saved: str | None = None  # the file that `with` begins from

    def _check_text(self, tokens: int) -> None:
        """Refuse windows of text that do not hold what each session needs."""
        answer = len(self._chat.prompt) + tokens + len(self._chat.closing)
        for name, what, size, limit in (
            ("text_sink", "the query", len(self._opening), self.method.text_sink),
            ("text_window", "an answer", answer, self.method.text_window),
        ):
            if size > limit:
                raise ValueError(
                    f"stream.Session: expected {name} to hold {what} and what the chat template adds, {size} tokens; "
                    f"got {limit}. Give {name}={size} or more."
                )

    # life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Session:
        """Patch the model, and read the query, or the file of a session that goes on."""
        if self._engine is not None:
            raise RuntimeError("stream.Session: expected one `with` at a time; got a second. Leave the first.")
        state = state_of(self.model)
        self._before = None if state is None else (state.whole, state.recorder.on, state.train)
        patch(self.model, self.method)
        try:
            cache = self._fresh() if self.saved is None else load_cache(self.model, self.saved)
            self._engine = Engine(
                self._base,
                cache,
                self._chat,
                self._vision,
                self.method.retention,
                self._sampler,
                self.settings.streams,
                self._stops,
                self._recorded,
            )
            if self.saved is None:
                self._engine.open(self._opening)
            else:
                self._go_on(read_notes(self.saved))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the memory go, and give the model back as it was."""
        self._engine = None
        if self._before is None:
            unpatch(self.model)
        else:
            plan, recorded, train = self._before
            patch(self.model, plan, cuda_graph=recorded, train=train)

    @property
    def engine(self) -> Engine:
        """What runs; only inside `with`."""
        if self._engine is None:
            raise RuntimeError(
                "stream.Session: expected to be used inside `with`; got a call outside. Write `with Session(...) as s`."
            )
        return self._engine

    # streams ------------------------------------------------------------------------------------------------------

    def run(self, frames: Iterable[Frame] | Sequence[Iterable[Frame]]) -> Iterator[Event]:
        """Read frames and comment on them, round by round, until the sources end.

        Args:
            frames: of the stream; where there are several streams, a list with the frames of each. Frames of a further
                call that begin again from zero go on where the stream stands.

        Raises:
            ValueError: frames that cannot be read, as many sources as there are no streams.
            Exception: whatever a source raises, after the events of the rounds before.
        """
        streams = self.settings.streams
        sources: list[Any] = [frames] if streams == 1 else list(frames)
        if len(sources) != streams:
            raise ValueError(
                f"stream.Session: expected frames of {streams} streams; got {len(sources)}. "
                f"Make it with streams={len(sources)}."
            )
        self.engine  # noqa: B018 - outside `with` nothing is read
        self._sources += sources
        each = [rounds(source, self.settings.round_s, t) for source, t in zip(sources, self._meter.t, strict=True)]
        for group in zip_longest(*each):
            yield from self._round(group)

    def ask(self, question: str, *, stream: int = 0, pinned: bool = True, max_new_tokens: int | None = None) -> Event:
        """Ask something between two rounds, and wait for the answer.

        Args:
            question: the words.
            stream: of which stream.
            pinned: the question stays for good, paid for out of the text sink; its answer does not.
            max_new_tokens: of this answer; None: as of a round.

        Raises:
            ValueError: pinned questions that the text sink cannot hold, before anything has changed.
        """
        budget = self._budget if max_new_tokens is None else Budget(max_new_tokens, self._budget.seconds)
        streams, meter = self.settings.streams, self._meter
        if not 0 <= stream < streams:
            raise ValueError(f"stream.ask: expected a stream from 0 to {streams - 1}; got {stream}. Give one of these.")
        turns = [Turn(question) if i == stream else None for i in range(streams)]
        with self._lock:
            began, t = time.perf_counter(), meter.t[stream]
            answer = self.engine.answer(turns, meter.t, budget, pinned)[stream]
            assert answer is not None
            return self._event(answer, t, t, stream, 0, time.perf_counter() - began, "answer")

    def pause(self) -> None:
        """Drop the frames that come, until `resume`; they are counted."""
        self._paused = True

    def resume(self) -> None:
        """Read frames again."""
        self._paused = False

    @property
    def stats(self) -> Stats:
        """The session so far, in numbers."""
        engine = self._engine
        held = [0] * self.settings.streams if engine is None else [row.tokens for row in engine.rows]
        return self._meter.stats(self._sources, held, 0 if engine is None else engine.cache.kv_bytes)

    def _fresh(self) -> LongContextCache:
        state = state_of(self.model)
        assert state is not None
        return state.fresh_cache()

    def _recorded(self) -> bool:
        state = state_of(self.model)
        return state is not None and state.recorder.on

    def _go_on(self, notes: dict[str, Any]) -> None:
        """Be what `state` told of."""
        self._meter = Meter.from_dict(notes["meter"])
        self.engine.rows = [Row.from_dict(row) for row in notes["rows"]]
        self._sampler.generator.set_state(torch.tensor(list(bytes.fromhex(notes["draws"])), dtype=torch.uint8))

    def state(self) -> dict[str, Any]:
        """All that a session is beside its cache, as JSON can hold it; RuntimeError after a turn that broke off."""
        self.engine.require_whole()
        return {
            "method": asdict(self.method),
            "settings": asdict(self.settings),
            "meter": self._meter.to_dict(),
            "rows": [row.to_dict() for row in self.engine.rows],
            "draws": bytes(self._sampler.generator.get_state().tolist()).hex(),
        }

    def _round(self, group: Sequence[Round | None]) -> list[Event]:
        """One round of every stream that has one, all in one batch."""
        meter = self._meter
        if self._paused:
            meter.dropped += sum(len(one.pictures) for one in group if one is not None)
            return []
        turns = [
            None if one is None else Turn(TIME.format(one.t, one.t_end), one.pictures, one.times, one.t_end - one.t)
            for one in group
        ]
        with self._lock:
            began = time.perf_counter()
            ends = [t if one is None else one.t_end for one, t in zip(group, meter.t, strict=True)]
            answers = self.engine.answer(turns, ends, self._budget)
            took = time.perf_counter() - began
            meter.latencies.append(took)
            events = []
            for i, (one, answer) in enumerate(zip(group, answers, strict=True)):
                if one is not None and answer is not None:
                    meter.t[i], meter.rounds[i] = one.t_end, meter.rounds[i] + 1
                    meter.frames += len(one.pictures)
                    events.append(self._event(answer, one.t, one.t_end, i, len(one.pictures), took, "caption"))
        return events

    def _event(self, answer: Answer, t: float, t_end: float, stream: int, frames: int, took: float, kind: Any) -> Event:
        self._meter.tokens += len(answer.ids)
        number = self._meter.rounds[stream] - (kind == "caption")
        text = self._chat.decode(answer.ids)
        return Event(t, t_end, text, kind, stream, number, frames, len(answer.ids), took, answer.stopped)
