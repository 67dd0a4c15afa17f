"""What a short cut is: it stands in place of a module's `forward`, in calls that want no gradients."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .cache.step import FEW
from .context import current

DEVICES = {"cuda"}
"""Types of devices on which there are short cuts: there a step's launches take longer than what they compute, and a
prompt's small operations read and write far more than they must."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(eq=False)
class ShortCut:
    """In place of a module's `forward`."""

    module: nn.Module

    @property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(type(self.module).forward)
        return own.replace(parameters=list(own.parameters.values())[1:])

    def due(self, few: bool = False) -> bool:
        """True inside a call, of few tokens if `few`, that nothing trains, compiles or records for gradients."""
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or self.module.training:
            return False
        forward = current()
        if forward is None or (few and forward.step.tokens > FEW):
            return False
        device = forward.step.kind
        return device in DEVICES and not torch.is_autocast_enabled(device)

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        return type(self.module).forward(self.module, *args, **kwargs)


def random(made: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers on the CPU, float32, to see on what a module computes."""
    return torch.randn(*shape, generator=made, dtype=torch.float32, device="cpu")


def gives(run: Callable[[], Any], *expected: Tensor) -> bool:
    """True if a call gives these tensors, bit for bit; one that fails gives something else."""
    try:
        with torch.no_grad():
            got = run()
    except Exception:  # code that nobody has seen, on input that it may not be made for
        return False
    found = got if isinstance(got, tuple) else (got,)
    return len(found) == len(expected) and all(
        isinstance(x, Tensor) and x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(found, expected, strict=True)
    )


def is_gated(module: nn.Module, gate: str, up: str, down: str) -> bool:
    """True if a module computes `down(silu(gate(x)) * up(x))`, whatever the dtype; seen on small layers.

    Args:
        module: of which the three names are linear layers of any kind.
        gate: name of the layer whose result goes through silu.
        up: of the one that it is multiplied with.
        down: of the one that reads the product.
    """
    made, probed = torch.Generator().manual_seed(0), copy(module)
    for dtype in DTYPES:
        small = {name: _small(made, *((24, 16) if name == down else (16, 24)), dtype) for name in (gate, up, down)}
        probed.__dict__["_modules"] = {**module._modules, **small}
        x = random(made, 2, 3, 16).to(dtype)
        with torch.no_grad():
            expected = small[down](silu(small[gate](x)) * small[up](x))
        if not gives(partial(type(module).forward, probed, x), expected):
            return False
    return True


def _small(made: torch.Generator, columns: int, rows: int, dtype: torch.dtype) -> nn.Linear:
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(random(made, rows, columns).to(dtype), requires_grad=False)
    return layer
