"""Where tenants differ: hooks on layers of the base, each with what all tenants have there, by slot.

The layers stay as they are, whatever they are made of: linears of 16 bits or quantized ones compute the base's output,
and what is here adds or replaces what is a tenant's own. What a hook does depends on shapes and on the route alone, but
that of experts looks at values, too, where they are not on a GPU. A row never depends on another row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ...kernels.between import between_graphs
from .route import Route
from .split import Part

if TYPE_CHECKING:
    from .embeddings import Table


class Where(Protocol):
    """What hooks ask: the route of the call, and how large the batch is."""

    slots: int
    batch: int

    def route(self) -> Route | None:
        """Tenants of the call's rows; None: all are the base's."""

    def table(self) -> Table | None:
        """The hook on the input embeddings, if there is one."""

    def part(self, module: nn.Module) -> Part | None:
        """What this process has of a linear layer; None: all of it."""

    def same(self) -> Hashable:
        """Equal for two calls in which hooks do the same."""

    def buffers(self) -> list[Tensor]:
        """Tensors that hooks read."""


def with_parameters(module: nn.Module, **parameters: Any) -> Callable[..., Any]:
    """A module's own `forward`, without hooks, on other parameters; the module is not touched."""
    other = object.__new__(type(module))
    other.__dict__.update(vars(module), _parameters={**module._parameters, **parameters})
    return partial(type(module).forward, other)


class Hook(ABC):
    """What is hung on one layer.

    Attributes:
        module: the layer.
        where: asked for the route.
    """

    def __init__(self, module: nn.Module, where: Where) -> None:
        self.module, self.where = module, where
        self.handles: list[Any] = [module.register_forward_hook(self._after, with_kwargs=True)]

    def remove(self) -> None:
        """Take it off the layer."""
        for handle in self.handles:
            handle.remove()

    @abstractmethod
    def put(self, slot: int, parts: Mapping[str, Any]) -> None:
        """Fill a slot with what a tenant has here; what it does not have is the base's."""

    @abstractmethod
    def after(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """The layer's output with each row its tenant's."""

    @abstractmethod
    def buffers(self) -> list[Tensor]:
        """Tensors of all slots, on the device."""

    @property
    def nbytes(self) -> int:
        """Bytes on the device, of all slots."""
        return sum(x.nbytes for x in self.buffers())

    @property
    def asks(self) -> bool:
        """Whether it looks at values on the host, so that what it does cannot be recorded."""
        return False

    @property
    def guest(self) -> Where | None:
        """Who answers for it where a call is recorded, or None: it cannot be."""
        return None if self.asks else self.where

    @abstractmethod
    def takes(self, parts: Mapping[str, Any]) -> bool:
        """True if a tenant fits into the memory that there is; if not, `make` makes it anew."""

    @abstractmethod
    def make(self, parts: Mapping[str, Any]) -> None:
        """Make memory for all slots that this tenant fits into, too; slots that are filled stay so."""

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if torch.compiler.is_compiling():
            return _outside(self, args, kwargs, out)
        return self.routed(args, kwargs, out)

    def routed(self, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """`after` with the route of the call, if it has one."""
        route = self.where.route()
        return out if route is None else self.after(route, args, kwargs, out)

    @property
    def _place(self) -> torch.device:
        return next(x.device for x in (*self.module.parameters(), *self.module.buffers()))


@between_graphs("tenants differ from call to call, and a graph keeps those of its first")
def _outside(hook: Hook, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
    return hook.routed(args, kwargs, out)


class Ahead(Hook):
    """What is hung on a linear layer, and may do the layer's product itself, before anything of the base is computed.

    Attributes:
        done: it has done so in the call that is running.
    """

    def __init__(self, module: nn.Module, where: Where) -> None:
        super().__init__(module, where)
        self.done = False
        self._forward = _Forward(self, vars(module).get("forward"))
        before = self._forward.before
        if type(module) is nn.Linear and (before is None or hasattr(before, "stock")):
            module.__dict__["forward"] = self._forward

    def remove(self) -> None:
        """As above."""
        super().remove()
        own = self.module.__dict__.pop("forward", None)
        if isinstance(own, _Forward):
            own = own.before
        if own is not None:
            self.module.__dict__["forward"] = own

    @abstractmethod
    def instead(self, input: Tensor, route: Route) -> Tensor | None:
        """The layer's output, each row its tenant's; None: the layer's own comes first, then `after`."""

    def base(self, input: Tensor) -> Tensor:
        """What the layer computes without tenants."""
        before, plain = self._forward.before, type(self.module).forward
        out: Tensor = before(input) if before else plain(self.module, input)
        return out


@dataclass(eq=False)
class _Forward:
    """In place of a layer's `forward`."""

    hook: Ahead
    before: Any  # a short cut that was there

    def __call__(self, input: Tensor) -> Tensor:
        """The layer's output; with what tenants have, where the hook can."""
        route = None if torch.compiler.is_compiling() else self.hook.where.route()  # then `after` does it
        made = None if route is None else self.hook.instead(input, route)
        if made is None:
            return self.hook.base(input)
        self.hook.done = True
        return made


def choose(route: Route, slot: int, found: Any, out: Any) -> Any:
    """Rows of one slot from `found`, the others from `out`; tuples part by part."""
    if isinstance(out, tuple):
        return tuple(choose(route, slot, *pair) for pair in zip(found, out, strict=True))
    return torch.where(wide(route.index(len(out), out.device) == slot, out.ndim), found, out)


def wide(rows: Tensor, dims: int) -> Tensor:
    """`[rows]` as `[rows, 1, ...]` with so many dimensions."""
    return rows.reshape(-1, *(1,) * (dims - 1))
