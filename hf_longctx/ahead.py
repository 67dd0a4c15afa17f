"""`generate()` asks late whether it is done: the device never waits for the host between two tokens.

After each token transformers asks whether every row has ended, and waits for the device to know. Where steps are
recorded, launching one takes the host less time than the device needs for it, so that this wait is all that the device
ever idles for. Here the answer is copied to the host behind the step, and read when the next one was launched. If it
was yes, that step was one too many: its token, its place in the cache and its draw are taken back.

transformers has a check of this kind (`DeferredStopCheck`), for Apple's GPUs alone. Ours stands where it stands, and
leaves it all models that are not patched. It asks late only of steps that are recorded, and only where nobody could
tell: not if a step more would call code of the user, and not if a cache that outlives the call could not forget it.
"""

from __future__ import annotations

import inspect
import weakref
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import utils as stock

from .cache.cache import LongContextCache
from .cache.last import can_crop, can_forget, take_back
from .graph import RECORDERS, Recorder
from .memory import cap
from .obstacles import foreign_hooks, guest

_CHECK = "DeferredStopCheck"
_ARGUMENTS = ("input_ids", "max_length", "cache", "cache_is_returned", "streamer")
_ASKED = ("device", "cache", "cache_is_returned", "is_assistant")
_NOTED = "_hf_longctx_made"

CRITERIA = {"MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria", "EosTokenCriteria"}
"""Of transformers: what they say follows from the text and the time."""

OWN_CALLS = {"PrefixConstrainedLogitsProcessor", "UnbatchedClassifierFreeGuidanceLogitsProcessor"}
"""Of transformers: they call a function of the user, or the model."""


@dataclass(eq=False)
class Noted:
    """In place of a method of the model that makes a list of criteria or processors: notes the list in the settings.

    Args:
        model: whose method.
        name: of the method.
    """

    model: PreTrainedModel
    name: str

    def __call__(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """What the model makes. The settings are those of one call of `generate`, and go with it."""
        made = getattr(type(self.model), self.name)(self.model, generation_config, *args, **kwargs)
        setattr(generation_config, _NOTED, {**getattr(generation_config, _NOTED, {}), self.name: list(made)})
        return made


METHODS = ("_get_stopping_criteria", "_get_logits_processor")
"""Methods of a model in whose place there is a `Noted`."""


@dataclass(eq=False)
class Run:
    """What is known of a call of `generate` when its prompt was read.

    Args:
        recorder: of the model's steps; the cache must not hold the model.
        ends: something else than the length may end it.
        draws: tokens are drawn.
    """

    recorder: weakref.ref[Recorder]
    ends: bool
    draws: bool


_RUNS: weakref.WeakKeyDictionary[LongContextCache, Run] = weakref.WeakKeyDictionary()
"""By the cache into which a prompt was read just now."""


def expect(model: PreTrainedModel, recorder: Recorder, cache: Any, settings: Any, device: torch.device) -> None:
    """Note that tokens follow a prompt, unless a step more could be noticed.

    Args:
        model: that generates.
        recorder: of its decoder's steps.
        cache: into which the prompt was read, or whatever the call returned.
        settings: of the call of `generate`.
        device: of the tokens.
    """
    if not isinstance(cache, LongContextCache):
        return
    _RUNS.pop(cache, None)
    made = getattr(settings, _NOTED, {})
    if not recorder.on or device.type not in RECORDERS or made.keys() != set(METHODS):
        return
    criteria, processors = (made[name] for name in METHODS)
    own = [x for x in criteria if not _is(x, "stopping_criteria") or type(x).__name__ not in CRITERIA]
    own += [x for x in processors if not _is(x, "logits_process") or type(x).__name__ in OWN_CALLS]
    if (
        own
        or cap(cache.plan) is not None
        or _several_processes()
        or _watched(model, recorder.decoder)
        or not _installed()
    ):
        return
    ends = any(type(x).__name__ != "MaxLengthCriteria" for x in criteria)
    _RUNS[cache] = Run(weakref.ref(recorder), ends, bool(settings.do_sample))


def _is(made: Any, module: str) -> bool:
    return type(made).__module__ == f"transformers.generation.{module}"


def _several_processes() -> bool:
    """Their steps go on until all have ended."""
    group = torch.distributed
    return group.is_available() and group.is_initialized() and group.get_world_size() > 1


def _watched(model: PreTrainedModel, decoder: Any) -> bool:
    """True if a hook around the decoder would see a step more."""
    inside = {id(module) for module in decoder.modules()} - {id(decoder)}
    around = [module for module in model.modules() if id(module) not in inside]
    hooks = chain.from_iterable((module._forward_pre_hooks, module._forward_hooks) for module in around)
    own = __name__.partition(".")[0] + "."
    return any(guest(x) is None and not type(x).__module__.startswith(own) for x in foreign_hooks(hooks))


# in place of transformers' check ----------------------------------------------------------------------------------


@dataclass(eq=False)
class Checks:
    """In place of transformers' class: makes our check for a `Run`, and that class's for all others.

    Args:
        stock: the class.
    """

    stock: Any

    def is_supported(
        self, device: torch.device, cache: Any, cache_is_returned: bool, is_assistant: bool = False
    ) -> bool:
        """Whether a call of `generate` may ask late; arguments as the class has them."""
        if not isinstance(cache, LongContextCache):
            return bool(self.stock.is_supported(device, cache, cache_is_returned, is_assistant=is_assistant))
        run = _RUNS.get(cache)
        if run is None or is_assistant:
            return False
        return not cache_is_returned or (can_forget if run.ends else can_crop)(cache)  # a user may interrupt any step

    def __call__(self, input_ids: Tensor, max_length: Any, cache: Any, cache_is_returned: bool, streamer: Any) -> Any:
        """The check of a call of `generate`."""
        run = _RUNS.pop(cache, None) if isinstance(cache, LongContextCache) else None
        if run is None:
            return self.stock(input_ids, max_length, cache, cache_is_returned, streamer)
        return LateCheck(run, input_ids, max_length, cache, streamer)


def _installed() -> bool:
    """True if our check stands in place of the one of a form that is known, as it does from the first call on."""
    found: Any = getattr(stock, _CHECK, None)
    if isinstance(found, Checks):
        return True
    if found is None or not hasattr(found, "is_supported"):
        return False
    known = tuple(inspect.signature(found).parameters), tuple(inspect.signature(found.is_supported).parameters)
    if known != (_ARGUMENTS, _ASKED):
        return False
    setattr(stock, _CHECK, Checks(found))
    return True


class _Slot:
    """What one step leaves for the host: copied behind it, in memory that is used again two steps later."""

    def __init__(self, input_ids: Tensor) -> None:
        self._device = input_ids.device
        on_gpu = self._device.type == "cuda"
        both = torch.empty(2, len(input_ids), dtype=torch.int64, pin_memory=on_gpu)
        self._unfinished, self._tokens = both.unbind()
        self._there = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        self.draws: Tensor | None = None  # the generator's state after the step

    def load(self, unfinished: Tensor, tokens: Tensor | None) -> None:
        self._unfinished.copy_(unfinished, non_blocking=True)
        if tokens is not None:
            self._tokens.copy_(tokens, non_blocking=True)
        if self._there is not None:
            self._there.record(torch.cuda.current_stream(self._device))

    def ended(self) -> bool:
        """True if no row goes on after the step; waits for it."""
        if self._there is not None:
            self._there.synchronize()
        return not bool(self._unfinished.any())

    def tokens(self) -> Tensor:
        """`[B]`, what the step made; `ended` has waited for it."""
        return self._tokens.clone()


class LateCheck:
    """Whether a call of `generate` is done, asked when the step after was launched.

    Args:
        run: what is known of the call.
        input_ids: `[B, T]`, its prompt.
        max_length: columns at which it ends; the step that comes to it is waited for, as none follows.
        cache: of the call.
        streamer: gets the tokens of a step when they are there, or None.
    """

    def __init__(self, run: Run, input_ids: Tensor, max_length: int | None, cache: Any, streamer: Any) -> None:
        self._recorder, self._draws = run.recorder(), run.draws
        self._cache, self._streamer = cache, streamer
        self._most = float("inf") if max_length is None else max_length
        self._device, self._last = input_ids.device, False
        self._free = [_Slot(input_ids) for _ in range(2)]
        self._open: _Slot | None = None  # of the step before, not looked at yet

    def __call__(self, unfinished_sequences: Tensor, tokens: Tensor, length: int) -> bool:
        """True if no step is to follow; arguments as transformers' check has them."""
        slot = self._free.pop()
        slot.load(unfinished_sequences, None if self._streamer is None else tokens)
        slot.draws = self._generator().get_state() if self._draws else None
        before, self._open = self._open, None
        if before is not None:
            if self._ended(before, one_more=True):
                self._last = True
                return True
            self._free.append(before)
        if self._recorder is not None and self._recorder.took and length < self._most:
            self._open = slot
            return False
        self._free.append(slot)
        return self._ended(slot)

    def finish(self) -> int:
        """How many steps were too many; they are forgotten but for what `generate` itself holds of them."""
        return int(self._last)

    def _ended(self, slot: _Slot, one_more: bool = False) -> bool:
        """True if a step was the last; one_more: another one follows already, and is taken back then."""
        try:
            done = slot.ended()
            if self._streamer is not None:
                self._streamer.put(slot.tokens())
        except BaseException:
            if one_more:
                self._forget(slot)
            raise
        if done and one_more:
            self._forget(slot)
        return done

    def _forget(self, slot: _Slot) -> None:
        """Undo the step after `slot`."""
        take_back(self._cache)
        if slot.draws is not None:
            self._generator().set_state(slot.draws)

    def _generator(self) -> torch.Generator:
        if self._device.type != "cuda":
            return torch.default_generator
        return torch.cuda.default_generators[self._device.index]
