"""Short cuts where QoQ layers follow: what they read becomes integers in the launch that makes it.

A norm gives its result and, beside, the 8-bit form that the layers after it would make of it; a gate and what it is
multiplied with go to the layer after them in that form alone. The bits are those of the model's own code.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import nn

from . import shortcut
from .kernels.compiled import library
from .kernels.linear import is_one_launch, quantize_gated, quantize_norm
from .shortcut import ShortCut
from .shortcuts import Norm
from .weights.qoq.linear import QoQLinear, keep_tokens

DTYPES = (torch.bfloat16, torch.float16)
"""Of activations, for which there is one launch."""


def install(decoder: Any) -> None:
    """Put these in the place of what is proved to be the same, after `shortcuts.install`; no-op without QoQ layers."""
    read = {module.in_features for module in decoder.modules() if isinstance(module, QoQLinear)}
    if not read or decoder.device.type not in shortcut.DEVICES or library.reason(decoder.device) is not None:
        return
    known: dict[Any, Any] = {}
    for module in decoder.modules():
        found = vars(module).get("forward")
        if type(found) is Norm and len(found.module.weight) in read:  # type: ignore[arg-type]
            module.__dict__["forward"] = IntegerNorm(found.module, found.eps, found.offset, found.early)
        elif found is None and (names := _names(module, known)) is not None:
            module.__dict__["forward"] = Gated(module, *names)


@dataclass(eq=False)
class IntegerNorm(Norm):
    """In place of a norm's `forward`, of which QoQ layers read what comes out."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One launch for the norm and the 8-bit form, or as `Norm`."""
        weight: Any = self.module.weight
        if kwargs or not self.due() or args[0].is_inference() or not args[0].dtype == weight.dtype in DTYPES:
            return super().__call__(*args, **kwargs)
        if self.weights(args[0])[1] is not None:
            return super().__call__(*args, **kwargs)
        x = args[0]
        rows, tokens = quantize_norm(x.reshape(-1, x.shape[-1]), weight, self.eps, self.offset, self.early)
        normed = rows.view(x.shape)
        keep_tokens(normed, tokens)
        return normed


@dataclass(eq=False)
class Gated(ShortCut):
    """In place of the `forward` of `down(silu(gate(x)) * up(x))`; the names of the three layers."""

    gate: str
    up: str
    down: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The product, and its 8-bit form, in one launch; or the module's own forward."""
        layers: list[Any] = [self.module._modules.get(name) for name in (self.gate, self.up, self.down)]
        if kwargs or not self.due() or not all(map(_plain, layers)) or args[0].dtype not in DTYPES:
            return self.stock(*args, **kwargs)
        x, (gate, up, down) = args[0], layers
        opened, raised = gate(x).flatten(0, -2), up(x).flatten(0, -2)
        if is_one_launch(opened):
            return down.of_gated(opened, raised).view(*x.shape[:-1], -1)
        return down.of_tokens(quantize_gated(opened, raised), x.dtype).view(*x.shape[:-1], -1)


def _plain(layer: Any) -> bool:
    """True for a QoQ layer at whose calls nobody else looks."""
    if type(layer) is not QoQLinear or "forward" in vars(layer):
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks)


def _names(module: nn.Module, known: dict[Any, Any]) -> tuple[str, ...] | None:
    """Which of a module's three layers is the gate, which it is multiplied with, which reads both; None: not known."""
    layers: dict[str, Any] = {name: x for name, x in module.named_children() if type(x) is QoQLinear}
    if len(layers) != 3 or list(inspect.signature(type(module).forward).parameters)[2:]:
        return None
    others = tuple((name, repr(x)) for name, x in module.named_children() if name not in layers)
    sizes = tuple((name, x.in_features, x.out_features, x.bias is None) for name, x in layers.items())
    settings = {name: x for name, x in vars(module).items() if isinstance(x, bool | int | float | str)}
    key = type(module), others, sizes, tuple(sorted(settings.items()))
    if key not in known:
        known[key] = next((names for names in permutations(layers) if _is_gated(module, layers, *names)), None)
    found: tuple[str, ...] | None = known[key]
    return found


def _is_gated(module: nn.Module, layers: dict[str, Any], gate: str, up: str, down: str) -> bool:
    """True if a module computes `down(silu(gate(x)) * up(x))`, whatever the dtype; seen on small layers."""
    outer, inner = {layers[gate].in_features, layers[up].in_features}, {layers[gate].out_features}
    if {layers[down].out_features} != outer or inner | {layers[down].in_features} != {layers[up].out_features}:
        return False
    return shortcut.is_gated(module, gate, up, down)
