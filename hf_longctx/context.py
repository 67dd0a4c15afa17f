"""One call of a patched decoder, as its attention layers find it; and what is known of patched models."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

from torch import Tensor

from .cache.cache import LongContextCache
from .cache.step import Step
from .kernels import dispatch
from .kernels.types import Logits, Selection, Visibility
from .models import ModelFacts
from .plan import HeadGroup, Plan, Selector

NAME = "hf_longctx"
"""The name under which this function and its mask function are registered with transformers."""


@dataclass(frozen=True)
class Rotary:
    """How a layer rotates; `inv_freq` None: it does not.

    Args:
        inv_freq: `[R/2]`, float32.
        interleaved: rotated pairs are channels (2i, 2i+1), not (i, i + R/2).
    """

    inv_freq: Tensor | None
    interleaved: bool = False


@dataclass(frozen=True)
class Read:
    """What one group of heads read in one call, each row's real tokens first, and what came of it.

    Args:
        layer: number of the layer.
        group: which KV heads of it.
        step: where the call's tokens stand.
        q: `[B, Hq', T, D]`.
        k: `[B, Hkv', S, D]`, fresh and stored.
        v: `[B, Hkv', S, Dv]`, likewise.
        logits: from products to logits.
        see: which keys each query sees.
        out: `[B, Hq', T, Dv]`.
    """

    layer: int
    group: HeadGroup
    step: Step
    q: Tensor
    k: Tensor
    v: Tensor
    logits: Logits
    see: Visibility
    out: Tensor

    @property
    def q_heads(self) -> list[int]:
        """The group's query heads, by their numbers in the layer."""
        per_kv = self.q.shape[1] // self.k.shape[1]
        return [head * per_kv + i for head in self.group.kv_heads for i in range(per_kv)]


@dataclass(eq=False)
class Forward:
    """One call of a patched decoder, handed to its attention layers; opaque to everyone else.

    Args:
        facts: of the model.
        plan: what each head does.
        step: where the call's tokens stand.
        cache: where they go, or None.
        rotary: how each layer rotates; empty unless positions are counted in the cache.
        probe: if given, layers put their queries and keys in here and attend to nothing.
        watch: if given, called with layer, group, selector, positions of the queries and what they read, wherever
            blocks are chosen.
        tap: if given, called with what each group of heads read; what it returns stands for the group's output.
        reads: in a decode call, what each layer chose, as for `Ledger.count`.
        recorded: the decoder replays this call, or records it.
        texts: where rows hold several packed texts: each of them, in the order of rows and columns.
    """

    facts: ModelFacts
    plan: Plan
    step: Step
    cache: LongContextCache | None
    rotary: tuple[Rotary, ...] = ()
    probe: dict[int, tuple[Tensor, Tensor]] | None = None
    watch: Callable[[int, HeadGroup, Selector, Tensor, Selection], None] | None = None
    tap: Callable[[Read], Tensor] | None = None
    recorded: bool = False
    texts: tuple[Text, ...] = ()
    reads: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    memo: dict[Any, Any] = field(default_factory=dict)

    def count(self) -> None:
        """Tell the cache's ledger what the layers read of a decode call."""
        for device in {read[0].device for read in self.reads}:
            assert self.cache is not None
            self.cache.ledger.count_all("decode", [read for read in self.reads if read[0].device == device])
        self.reads.clear()

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What all layers share, made by the first that asks."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]


@dataclass(frozen=True)
class Text:
    """One of several texts that are packed into a row, as a call of its own.

    Args:
        row: of the batch.
        columns: of the row.
        forward: the call that the text would be by itself.
    """

    row: int
    columns: slice
    forward: Forward


_LOCAL = threading.local()


def current() -> Forward | None:
    """The call of a patched decoder that runs on this thread; None after one that was interrupted."""
    running: ReferenceType[Forward] | None = getattr(_LOCAL, "forward", None)
    return None if running is None else running()


def enter(forward: Forward | None, hold: bool = False) -> None:
    """Make `forward` the current call of this thread, None at its end; `hold` it where nobody else does."""
    dispatch.look_once(forward is not None)
    _LOCAL.forward = None if forward is None else ref(forward)
    _LOCAL.held = forward if hold else None
