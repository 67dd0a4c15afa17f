"""Short cuts of linear layers: a decode step's few rows against weights of 16 bits, which are read as fast as they can.

Linear layers of an attention that get the same tensor (queries, keys, values) are one launch, and so are both halves of
a gated MLP. Sums run in another order than in torch's product, so a result may differ in its last bit. Hooks on layers
run as ever; a layer that is not a plain `nn.Linear` is left alone, and so is an MLP that has such a layer. What an MLP
computes between its layers is one launch for more rows, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear

from .kernels.compiled.project import MOST_ROWS
from .kernels.layers import gated, project, project_gated
from .shortcut import DTYPES, ShortCut, is_gated

_TOGETHER = ("q_proj", "k_proj", "v_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_LARGE, _ROWS_OF_LARGE = 1 << 25, 2
"""Elements of weights from which torch's product is as fast for more rows than that: there is little to launch."""


@dataclass(eq=False)
class Made:
    """Results that were made together and not all fetched yet.

    Attributes:
        layers: that are done together.
        given: the tensor that they got.
        waiting: results, by the number of the layer.
        apart: layers got different tensors once: from then on each is done by itself.
    """

    layers: tuple[nn.Linear, ...]
    given: Tensor | None = None
    waiting: dict[int, Tensor] = field(default_factory=dict)
    apart: bool = False

    def take(self, number: int, x: Tensor) -> Tensor:
        """The product of one of them."""
        if number == 0 and not self.apart:
            rows = x.reshape(-1, x.shape[-1])
            weights, biases = [y.weight for y in self.layers], [y.bias for y in self.layers]
            made = [y.view(*x.shape[:-1], -1) for y in project(rows, weights, biases)]
            self.given, self.waiting = x, dict(enumerate(made))
        if self.given is x and number in self.waiting:
            out = self.waiting.pop(number)
            if not self.waiting:
                self.given = None
            return out
        self.apart = self.apart or len(self.layers) > 1
        self.given, self.waiting = None, {}
        return _product(self.layers[number], x)


@dataclass(eq=False)
class Product(ShortCut):
    """In place of a linear layer's `forward`: the layer of that number in `made`."""

    made: Made
    number: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One launch for all of them, or the layer's own."""
        if len(args) != 1 or kwargs or _many(args[0]):  # a prompt, first of all
            return self.stock(*args, **kwargs)
        if not self.due(few=True) or not _few(args[0], *self.made.layers):
            return self.stock(*args, **kwargs)
        return self.made.take(self.number, args[0])


@dataclass(eq=False)
class Gated(ShortCut):
    """In place of the `forward` of an MLP that is `down(silu(gate(x)) * up(x))`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Two launches for few rows; for many, or layers with hooks, these and one launch between; or the MLP's own."""
        parts: list[Any] = [self.module._modules.get(name) for name in _GATED]
        if len(args) != 1 or kwargs or not self.due() or None in parts:
            return self.stock(*args, **kwargs)
        x, (gate, up, down) = args[0], parts
        if not all(map(_plain, parts)):
            return down(gated(gate(x), up(x)))
        if _many(x) or not self.due(few=True) or not _few(x, *parts):  # without the calls of three modules
            inner = gated(linear(x, gate.weight, gate.bias), linear(x, up.weight, up.bias))
            return linear(inner, down.weight, down.bias)
        inner = project_gated(x.reshape(-1, x.shape[-1]), gate.weight, up.weight)
        return _product(down, inner).view(*x.shape[:-1], -1)


def find(module: nn.Module, known: dict[Any, Any]) -> dict[nn.Module, ShortCut]:
    """Short cuts of a module or of linear layers in it.

    Args:
        module: of a decoder.
        known: what was seen of modules before.
    """
    layers: list[Any] = [getattr(module, name, None) for name in _TOGETHER]
    if all(type(x) is nn.Linear and x.in_features == layers[0].in_features for x in layers):
        made = Made(tuple(layers))
        return {layer: Product(layer, made, number) for number, layer in enumerate(layers)}
    if type(module) is nn.Linear:
        return {module: Product(module, Made((module,)), 0)}
    return {module: Gated(module)} if _gated(module, known) else {}


def _product(layer: nn.Linear, x: Tensor) -> Tensor:
    return project(x.reshape(-1, x.shape[-1]), [layer.weight], [layer.bias])[0].view(*x.shape[:-1], -1)


def _many(x: Any) -> bool:
    """True for more rows than any short cut of a linear layer takes."""
    return isinstance(x, Tensor) and x.numel() > MOST_ROWS * x.shape[-1]


def _few(x: Any, *layers: nn.Linear) -> bool:
    """True for few rows and weights of the same 16 bits; all else is left to torch."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPES[1:]:
        return False
    large = sum(y.in_features * y.out_features for y in layers) > _LARGE
    if x.numel() > (_ROWS_OF_LARGE if large else MOST_ROWS) * x.shape[-1]:
        return False
    return all(type(y.weight) is nn.Parameter and y.weight.dtype == x.dtype for y in layers)


def _plain(layer: Any) -> bool:
    """True for a linear layer with nothing hung on it."""
    own = vars(layer).get("forward")
    hooks = layer._forward_hooks or layer._forward_pre_hooks if type(layer) is nn.Linear else True
    return not hooks and (own is None or isinstance(own, Product))


def _gated(module: nn.Module, known: dict[Any, Any]) -> bool:
    """True for an MLP that computes on random numbers what its short cut is defined to compute."""
    parts: list[Any] = [module._modules.get(name) for name in _GATED]
    if not all(type(x) is nn.Linear for x in parts) or any(x.bias is not None for x in parts[:2]):
        return False
    others = tuple(type(x) for name, x in module._modules.items() if name not in _GATED)
    settings = {name: x for name, x in vars(module).items() if isinstance(x, bool | float | str)}
    key = type(module), others, tuple(sorted(settings.items()))
    if key not in known:
        known[key] = is_gated(module, *_GATED)
    return bool(known[key])
