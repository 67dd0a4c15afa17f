"""One call of a patched decoder, as its attention layers find it; and what is known of patched models."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn

from .cache.cache import LongContextCache
from .cache.step import Step
from .models import ModelFacts
from .plan import Plan

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
    """

    facts: ModelFacts
    plan: Plan
    step: Step
    cache: LongContextCache | None
    rotary: tuple[Rotary, ...] = ()
    probe: dict[int, tuple[Tensor, Tensor]] | None = None
    memo: dict[Any, Any] = field(default_factory=dict)


PATCHED: WeakSet[nn.Module] = WeakSet()
"""Attention modules of patched models."""

_LOCAL = threading.local()


def current() -> Forward | None:
    """The call of a patched decoder that runs on this thread."""
    return getattr(_LOCAL, "forward", None)


def enter(forward: Forward | None) -> None:
    """Make `forward` the current call of this thread, None at its end."""
    _LOCAL.forward = forward


STOCK: list[tuple[Any, str]] = []
"""Configurations of patched models, each with the attention implementation that it had."""


def stock_name(config: Any) -> str:
    for known, name in STOCK:
        if known is config:
            return name
    raise RuntimeError(
        f"hf_longctx: expected a patched model; got attn_implementation='{NAME}' on one that is not. "
        "Load it with another implementation, then call hf_longctx.patch(model, method)."
    )
