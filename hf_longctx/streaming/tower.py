"""The layers of a vision tower, recorded once for a size of pictures and replayed: one launch in place of thousands.

Nothing is known of a tower but that its layers are called one after the other, each with what the one before gave. The
first pictures of a size run as they are while the calls are noted; for the second the whole chain is recorded, and from
then on the call of the first layer is a replay, and those of the others look up what it made. A call that is not as it
was noted is computed as ever, and so are all that follow.

Recorded layers attend to all windows of a picture at once, where a model cuts them apart and calls one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..graph import CudaGraph
from ..obstacles import foreign_hooks
from ..recording import Graph
from .windows import at_once

RECORDERS: dict[str, type[Graph]] = {"cuda": CudaGraph}
"""What records a chain, by type of device."""

MOST_BYTES = 2**28
"""What layers may give, all together, in a chain that is recorded: it is held, and larger ones are no longer bound by
launches."""

MOST_SIZES = 2
"""Sizes of pictures that are recorded at a time."""

_FEW = 4096
"""Elements of a tensor of integers that is a list of lengths, which are read on the host."""


@dataclass(frozen=True)
class Input:
    """A tensor among the arguments of the first layer, by its number there; others are as they were noted."""

    number: int


@dataclass(eq=False)
class Take:
    """The chain for one size of pictures.

    Args:
        key: what the call of the first layer has in common with others that are replays.
        inputs: tensors of that call, in memory of their own.
        notes: arguments of each layer: `Input` for a tensor, `list` for lengths, else what they are; and the key.
        outs: what each layer gave; good until the next pictures.
    """

    key: Any
    inputs: list[Tensor]
    notes: list[tuple[Any, Any]] = field(default_factory=list)
    outs: list[Tensor] = field(default_factory=list)
    graph: Graph | None = None


class Tower:
    """The vision tower of a model, for sessions.

    Args:
        model: the vision-language model.
        on: whether anything is recorded.
    """

    def __init__(self, model: Any, on: Callable[[], bool]) -> None:
        self._tower = model.get_encoder(modality="image")
        self._layers, self._on = _chain(self._tower), on
        inside = [module for layer in self._layers for module in layer.modules()]
        self._hooks = [hooks for module in inside for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        odd = any(
            "_hf_hook" in vars(x) or "forward" in vars(x) or hasattr(type(x), "merged_adapters")
            for x in (self._tower, *inside)
        )
        self._able = len(self._layers) > 1 and not odd
        self._takes: list[Take] = []
        self._pool: list[Any] = []
        self._weights: tuple[int, ...] = ()
        self._now: Take | None = None
        self._sources: list[Tensor] = []
        self._replays, self._bytes = False, 0
        self._lengths: dict[int, tuple[Tensor, list[int]]] = {}

    @property
    def graphs(self) -> list[Graph]:
        """What is recorded now."""
        return [take.graph for take in self._takes if take.graph is not None]

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Inside the block the tower's layers are replayed where they can be."""
        if not self._able or not self._on() or torch.is_grad_enabled() or self._tower.training:
            yield
            return
        weights = tuple(next(layer.parameters()).data_ptr() for layer in self._layers)
        if weights != self._weights:
            self._forget()
            self._weights = weights
        for number, layer in enumerate(self._layers):
            layer.__dict__["forward"] = partial(self._call, number)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.__dict__["forward"]
            self._now, self._sources = None, []
            self._lengths.clear()

    def _forget(self) -> None:
        self._takes.clear()
        self._pool.clear()

    def _stock(self, number: int, *args: Any, **kwargs: Any) -> Any:
        layer = self._layers[number]
        return type(layer).forward(layer, *args, **kwargs)

    # one call -----------------------------------------------------------------------------------------------------

    def _call(self, number: int, *args: Any, **kwargs: Any) -> Any:
        """In place of a layer's forward."""
        if number == 0:
            self._begin(args, kwargs)
        take = self._now
        if take is None:
            return self._stock(number, *args, **kwargs)
        if self._replays:
            _, key = self._noted(args, kwargs, take.outs[number - 1] if number else None)
            if key == take.notes[number][1]:
                return take.outs[number]
            self._able, self._now = False, None  # what was recorded stays until the block ends: its results are in use
            return self._stock(number, *args, **kwargs)
        return self._note(take, number, args, kwargs)

    def _note(self, take: Take, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A layer's call as it is, noted."""
        note, key = self._noted(args, kwargs, take.outs[0] if number else None)
        out = self._stock(number, *args, **kwargs)
        if key is None or not isinstance(out, Tensor) or len(take.notes) != number:
            self._able, self._now = False, None  # not a chain that is understood
            return out
        take.notes.append((note, key))
        take.outs, self._bytes = [out], self._bytes + out.nbytes
        if number == len(self._layers) - 1:
            take.outs, self._now = [], None
            if self._bytes <= MOST_BYTES:
                self._takes = [*self._takes, take][-MOST_SIZES:]
        return out

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The first layer's call: replay a chain, record it, or begin to note it."""
        self._now, self._sources = None, [x for x in _tensors((args, kwargs)) if not _is_list(x)]
        if not self._sources or self._sources[0].device.type not in RECORDERS or foreign_hooks(self._hooks):
            return
        _, key = self._noted(args, kwargs, None)
        take = next((take for take in self._takes if take.key == key), None)
        self._replays = take is not None
        if take is None:
            self._now, self._bytes = Take(key, []), 0
            return
        if take.graph is None:
            self._record(take)
        else:
            for x, source in zip(take.inputs, self._sources, strict=True):
                x.copy_(source)
        if take.graph is not None:
            take.graph.replay()
            self._now = take

    def _record(self, take: Take) -> None:
        """Record a chain that was noted; leaves it without a graph where that cannot be."""
        take.inputs = [x.clone() for x in self._sources]
        device, run = take.inputs[0].device, partial(self._run, take)
        if not self.graphs:
            self._pool.clear()  # torch takes no memory again that no graph holds
        recorder = RECORDERS[device.type]
        try:
            recorder.first(run, device)  # what kernels set up when they first run must not be recorded
            take.graph = recorder(run, device, self._pool)
        except RuntimeError:
            self._able = False
            self._forget()

    def _run(self, take: Take) -> list[Tensor]:
        """All layers, on inputs in memory of their own."""
        take.outs = []
        for number, (note, _) in enumerate(take.notes):
            args, kwargs = self._filled(note, take)
            with at_once(self._tower.config, kwargs) as given:
                take.outs.append(self._stock(number, *args, **given))
        return take.outs

    # arguments ----------------------------------------------------------------------------------------------------

    def _noted(self, args: Any, kwargs: Any, before: Tensor | None) -> tuple[Any, Any]:
        """A call's arguments with `Input` for tensors, and what it has in common with others; None: not understood."""
        known = {id(x): Input(n) for n, x in enumerate(self._sources)}

        def note(x: Any) -> Any:
            if isinstance(x, tuple | list):
                return tuple(map(note, x))
            if not isinstance(x, Tensor):
                return x
            if x is before:
                return Input(-1)
            return list(self._read(x)) if _is_list(x) else known[id(x)]

        try:
            made = tuple(map(note, args)), {name: note(x) for name, x in kwargs.items()}
        except KeyError:
            return None, None
        shapes = tuple((x.shape, x.dtype, x.stride()) for x in self._sources)
        return made, (shapes, made)

    def _read(self, x: Tensor) -> list[int]:
        """Integers of a tensor, which is looked at once in a call of the tower."""
        if id(x) not in self._lengths:
            self._lengths[id(x)] = x, x.tolist()
        return self._lengths[id(x)][1]

    def _filled(self, note: Any, take: Take) -> tuple[Any, dict[str, Any]]:
        """Arguments as they were noted."""
        device = take.inputs[0].device
        flash = "flash" in (self._tower.config._attn_implementation or "")

        def fill(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(fill, x))
            if isinstance(x, list):  # where the model reads them: kernels of flash attention do so on the device
                return torch.tensor(x, dtype=torch.int32, device=device if flash else "cpu")
            if isinstance(x, Input):
                return take.outs[-1] if x.number < 0 else take.inputs[x.number]
            return x

        args, kwargs = note
        return tuple(map(fill, args)), {name: fill(x) for name, x in kwargs.items()}


def _chain(tower: Any) -> list[nn.Module]:
    """The layers of a tower that are called one after the other, by their looks: the longest list of one class."""
    lists = [list(module) for module in tower.modules() if isinstance(module, nn.ModuleList)]
    alike = [x for x in lists if x and isinstance(x[0], GradientCheckpointingLayer) and len(set(map(type, x))) == 1]
    return max(alike, key=len, default=[])


def _is_odd(module: nn.Module) -> bool:
    """True if something else than its class decides what a module does."""
    return "_hf_hook" in vars(module) or "forward" in vars(module) or hasattr(type(module), "merged_adapters")


def _is_list(x: Tensor) -> bool:
    return x.ndim == 1 and not x.is_floating_point() and x.numel() <= _FEW


def _tensors(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, tuple | list) else ()
    return [found for part in parts for found in _tensors(part)]
