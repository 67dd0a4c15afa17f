"""Keys rotated at read: the model's own rotation is taken out of its layers, and done where keys are read.

A plan with `Contiguous` positions stores keys as they are before rotation. The decoder's rotary module then gives its
layers a rotation by nothing, and what it would have given to this call's queries and to the keys of all stored tokens.
No forward of the model is touched.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .cache.step import Step
from .context import Forward, current
from .errors import UnsupportedError
from .kernels import ops
from .kernels.between import between_graphs

_CALL = "angles"
UNTURNED = "unturned"
"""Under this name a call holds the cosines by which nothing turns, so that a layer knows them again."""


@dataclass(eq=False)
class AtRead:
    """In place of a rotary module's `forward`."""

    module: nn.Module

    @property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(type(self.module).forward)
        return own.replace(parameters=list(own.parameters.values())[1:])

    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """No rotation inside a call of the patched decoder, with the real one kept for its layers."""
        if torch.compiler.is_compiling():
            return _outside(self, x, position_ids)
        return self.kept(x, position_ids)

    def kept(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The same, in the current call."""
        cos, sin = self.real(x, position_ids)
        forward = current()
        if forward is None or not forward.plan.at_read or forward.probe is not None:
            return cos, sin
        forward.memo[_CALL] = position_ids, cos, sin
        forward.memo[UNTURNED] = ones = torch.ones_like(cos)
        return ones, torch.zeros_like(sin)

    def real(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[B, T, R]`, as the model itself has them."""
        module: Any = self.module
        cos, sin = type(module).forward(module, x, position_ids)
        return cos, sin


@between_graphs("angles are kept for what reads keys, which no graph does")
def _outside(module: AtRead, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    return module.kept(x, position_ids)


def install(decoder: Any, on: bool) -> None:
    """Take the rotation out of a decoder's layers, or give it back to them.

    Raises:
        UnsupportedError: the decoder does not rotate all layers alike, by one module that knows positions alone.
    """
    module = getattr(decoder, "rotary_emb", None)
    if not on:
        if module is not None and isinstance(vars(module).get("forward"), AtRead):
            del module.__dict__["forward"]
        return
    names = [] if module is None else list(inspect.signature(type(module).forward).parameters)
    if module is None or names != ["self", "x", "position_ids"]:
        raise UnsupportedError(
            "contiguous positions: expected a decoder with one rotary_emb(x, position_ids) for all layers; got "
            f"'{decoder.config.model_type}', which has {'none' if module is None else names}. Use another method."
        )
    module.__dict__.setdefault("forward", AtRead(module))


def turn_queries(forward: Forward, q: Tensor, step: Step) -> Tensor:
    """This call's queries, or keys of a call without a cache, at their positions.

    Args:
        forward: the call.
        q: `[B, H, T, D]`, un-rotated, each row's real tokens first.
        step: the call, on the device of q.
    """
    _, cos, sin = _own(forward, q.shape[0], step)
    return _turned(q, cos, sin)


def turn_keys(forward: Forward, k: Tensor, step: Step) -> Tensor:
    """Stored keys, this call's included, at their positions: `[B, H, S, D]`; arguments as `turn_queries`."""
    cache = forward.cache
    if cache is None or cache.angles is None:
        return turn_queries(forward, k, step)
    angles = cache.angles

    def put() -> bool:
        angles.put(*_own(forward, k.shape[0], forward.step), forward.step)
        return True

    forward.once(("put",), put)

    def view() -> tuple[Tensor, Tensor]:
        cos, sin = angles.view(k.shape[2])
        return cos.to(k.device), sin.to(k.device)

    cos, sin = forward.once(("angles at", k.shape[2], k.device), view)
    return _turned(k, cos, sin)


def _own(forward: Forward, rows: int, step: Step) -> tuple[Tensor, Tensor, Tensor]:
    """Positions, cosines and sines of the call's tokens, each row's real ones first; once for all layers."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        pos, cos, sin = (x.to(step.device) for x in forward.memo[_CALL])
        pos = pos.expand(*pos.shape[:-2], rows, -1)
        cos, sin = cos.expand(rows, -1, -1), sin.expand(rows, -1, -1)
        if step.order is not None:
            index = step.order[..., None].expand(-1, -1, cos.shape[2])
            cos, sin = cos.gather(1, index), sin.gather(1, index)
            pos = pos.gather(-1, step.order.expand(pos.shape))
        return pos, cos, sin

    made: tuple[Tensor, Tensor, Tensor] = forward.once(("own", step.device), make)
    return made


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, _ = ops.rotate_heads(x, x[:, :0], cos, sin, cos.shape[-1])
    return turned
