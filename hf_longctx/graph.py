"""The decode step of a patched model, recorded once and replayed: one launch in place of thousands.

So are rounds of a stream, calls of some hundred tokens that have the same length again and again.

A call of one token is run with a *bound* step: every place comes from lengths on the device, and views are made for
`Step.room` columns. What such a call does then depends on the host only through lengths at which a group of heads goes
over to something else (`limits.py`), and through whether blocks are chosen anew. The first call of a kind runs as it
is, the second is recorded while nothing is computed, and all that follow are replays. What a replay cannot do, to make
room on the host and to keep count there, is done before and after it. Whatever was recorded is thrown away when memory
that it uses has moved.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from .cache.cache import LongContextCache
from .cache.step import Step
from .context import Forward, current, enter
from .models import CACHE, takes_positions
from .obstacles import Guest, Obstacles, of_cache, of_call, of_model
from .plan import Plan
from .recording import SEEN, Graph, Recording, Take, is_round


class CudaGraph:
    """A call recorded as a CUDA graph.

    Args:
        run: the call; its kernels are noted and not run.
        device: where.
        pool: memory that the graphs of a cache share, as they never run at the same time.
    """

    def __init__(self, run: Callable[[], Any], device: torch.device, pool: list[Any]) -> None:
        if not pool:
            pool.append(torch.cuda.graph_pool_handle())
        torch.cuda.empty_cache()  # to record does so too, and what it frees is not the graph's
        before = torch.cuda.memory_reserved(device)
        self._graph = torch.cuda.CUDAGraph()
        now = torch.cuda.current_stream(device)
        try:
            with (
                torch.cuda.device(device),
                torch.cuda.graph(self._graph, pool[0], _stream(device), capture_error_mode="thread_local"),
            ):
                self._out = run()
        except BaseException:  # if recording cannot even be ended, torch stays on the stream of the recording
            torch.cuda.set_stream(now)
            raise
        self.nbytes = max(0, torch.cuda.memory_reserved(device) - before)

    @staticmethod
    def first(run: Callable[[], Any], device: torch.device) -> Any:
        """The call as it is, on the stream on which it will be recorded: what that needs is then there."""
        side, now = _stream(device), torch.cuda.current_stream(device)
        side.wait_stream(now)
        with torch.cuda.stream(side):
            out = run()
        now.wait_stream(side)
        return out

    def replay(self) -> Any:
        """As `Graph.replay`."""
        self._graph.replay()
        return self._out


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


RECORDERS: dict[str, type[Graph]] = {"cuda": CudaGraph}
"""What records a call, by type of device."""


class Recorder:
    """In place of a decoder's `forward`: replays calls of one token, and lets all others through.

    Attributes:
        on: whether anything is recorded.
        reason: why the last call of one token was not recorded, or None.
        took: the last call was to be recorded or replayed.
    """

    def __init__(self, decoder: Any, on: bool) -> None:
        self.decoder, self.on = decoder, on
        self.reason: str | None = None
        self.took = False
        self._failed: str | None = None
        self._rounds = True
        self._obstacles: Obstacles | None = None
        self._last: Callable[[], LongContextCache | None] = lambda: None  # the cache for which they were looked for
        self._held: weakref.WeakKeyDictionary[LongContextCache, Recording] = weakref.WeakKeyDictionary()

    @property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(type(self.decoder).forward)
        return own.replace(parameters=list(own.parameters.values())[1:])

    def __getstate__(self) -> dict[str, Any]:
        return {"decoder": self.decoder, "on": self.on}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__init__(**values)  # type: ignore[misc]

    def graphs(self, cache: LongContextCache | None) -> list[Graph]:
        """What is recorded on a cache now."""
        held = None if cache is None else self._held.get(cache)
        return [] if held is None else held.graphs

    def renew(self, on: bool) -> None:
        """Forget what was recorded and why not, as another plan is in force."""
        self.__init__(self.decoder, on)  # type: ignore[misc]

    def takes(
        self,
        plan: Plan,
        cache: LongContextCache,
        kwargs: Mapping[str, Any],
        tokens: Tensor,
        watched: bool,
        graphed: bool = False,
    ) -> bool:
        """True if a call will be recorded or replayed; if not and it is a decode step, `reason` says why.

        Args:
            plan: in force.
            cache: of the call.
            kwargs: its arguments.
            tokens: `[B, T]` or `[B, T, hidden]`, its input.
            watched: someone is to be told of every choice of blocks.
            graphed: the decoder runs in graphs of a compiler.
        """
        self.took = False
        if not self.on or not cache.ledger.columns or tokens.device.type not in RECORDERS:
            return False
        of_round = tokens.shape[1] > 1
        if of_round and not (self._rounds and is_round(plan, cache, kwargs, tokens)):
            return False
        if self._obstacles is None or self._obstacles.plan is not plan or self._last() is not cache:
            self._obstacles, self._last = of_model(self.decoder, plan), weakref.ref(cache)
        reason = self._failed or self._obstacles.now() or of_call(self.decoder, kwargs, watched, graphed)
        reason = reason or of_cache(cache)
        self.reason = self.reason if of_round else reason
        self.took = reason is None
        return self.took

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward."""
        if torch.compiler.is_compiling():
            return type(self.decoder).forward(self.decoder, *args, **kwargs)
        forward = current()
        if forward is None or not forward.recorded or forward.cache is None:
            return type(self.decoder).forward(self.decoder, *args, **kwargs)
        return self._step(forward, forward.cache, kwargs)

    def _step(self, forward: Forward, cache: LongContextCache, kwargs: dict[str, Any]) -> Any:
        step, held = forward.step, self._held.get(cache)
        inputs, others = _sorted(self.decoder, kwargs, step)
        if held is None or not held.covers(cache, step.end):
            self._held.pop(cache, None)
            held = Recording.of(cache, forward.plan, step.end)
            try:
                cache.prepare(replace(step, room=held.room))
            except torch.OutOfMemoryError as error:
                return self._without(f"no memory for {held.room} tokens in every row ({_first(error)})", kwargs)
            self._held[cache] = held
        cache.make_room(step)
        guests = [] if self._obstacles is None else self._obstacles.guests()
        due = held.due(step.columns)
        kind = _kind(self.decoder, inputs, others, step), *(guest.same() for guest in guests)
        take = held.take((due, kind), inputs, step, cache.ledger.rows)
        run = partial(_run, self.decoder, take, others, forward, held.room)
        if take.ran < (1 if step.tokens == 1 else SEEN):  # what kernels set up when they first run is not recorded
            out, take.ran = RECORDERS[step.device.type].first(run, step.device), take.ran + 1
        else:
            before = [kept.since for kept, _ in held.chosen]
            try:
                graph = self._graph(take, held, cache, step, run, guests)
            except RuntimeError as error:
                held.undo(before)
                if step.tokens > 1:
                    self._rounds = False
                    return type(self.decoder).forward(self.decoder, **kwargs)
                return self._without(f"the call could not be recorded ({_first(error)})", kwargs)
            out = graph.replay()
        held.passed(step, due)
        return _whole(out, cache)

    def _graph(
        self,
        take: Take,
        held: Recording,
        cache: LongContextCache,
        step: Step,
        run: Callable[[], Any],
        guests: Sequence[Guest],
    ) -> Graph:
        """The graph of a call, recorded now if there is none or what it uses has moved."""
        read = [x for guest in guests for x in guest.buffers()]
        if take.graph is None or not take.fits([*cache.buffers(), *read]):
            take.graph = None
            held.let_go()
            cache.prepare(replace(step, room=held.room))
            take.used = [weakref.ref(x) for x in (*cache.buffers(), *read)]
            take.graph = RECORDERS[step.device.type](run, step.device, held.pool)
        return take.graph

    def _without(self, reason: str, kwargs: dict[str, Any]) -> Any:
        """Compute the call as any other, and let those to come be."""
        self.reason = self._failed = reason
        self._held.clear()
        return type(self.decoder).forward(self.decoder, **kwargs)


# one call ---------------------------------------------------------------------------------------------------------


def _sorted(decoder: Any, kwargs: Mapping[str, Any], step: Step) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A call's arguments: tensors, and what else there is. The mask is in the step; positions must be given."""
    left_out = ("attention_mask", CACHE, "hf_longctx")
    given = {name: x for name, x in kwargs.items() if name not in left_out and x is not None}
    if takes_positions(decoder) and "position_ids" not in given:
        given["position_ids"] = torch.full((1, 1), step.columns, device=step.device)
    inputs = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    return inputs, {name: x for name, x in given.items() if name not in inputs}


def _kind(decoder: Any, inputs: Mapping[str, Tensor], others: Mapping[str, Any], step: Step) -> Any:
    """What two calls have in common whose graph is the same."""
    shapes = tuple((name, x.shape, x.dtype) for name, x in sorted(inputs.items()))
    weight = next(decoder.parameters())
    mode = (step.real is None, torch.is_inference_mode_enabled(), weight.dtype, weight.data_ptr())
    return step.lengths.device, shapes, tuple(sorted(others.items())), mode


def _run(decoder: Any, take: Take, others: Mapping[str, Any], forward: Forward, room: int) -> Any:
    """The decoder's forward on inputs in place, with no place of a token known to the host."""
    step = replace(forward.step, lengths=take.lengths, real=take.real, ragged=True, room=room)
    bound = replace(forward, step=step, reads=[], memo={})
    before = current()
    enter(bound)
    try:
        own = {CACHE: forward.cache, "hf_longctx": bound}
        out = type(decoder).forward(decoder, **take.inputs, **others, **own)
        bound.count()
    finally:
        enter(before)
    out[CACHE] = None  # what is recorded on a cache must not hold it
    return out


def _whole(out: Any, cache: LongContextCache) -> Any:
    """An output in memory of its own."""
    own = {name: x.clone() if isinstance(x, Tensor) else x for name, x in out.items()}
    return type(out)(**{**own, CACHE: cache})


def _first(error: BaseException) -> str:
    """The first line of the message of what went wrong first: recording that then ends says only that it failed."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
