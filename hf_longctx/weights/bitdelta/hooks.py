"""Where tenants differ: hooks on layers of the base, each with what all tenants have there, by slot.

The layers stay as they are, whatever they are made of: linears of 16 bits or quantized ones compute the base's output,
and what is here adds or replaces what is a tenant's own. No hook looks at values: what it does depends on shapes and on
the route alone, so that it can be recorded, and a row never depends on another row.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.delta import delta_linear
from .bits import Matrix
from .route import Route


class Where(Protocol):
    """What hooks ask: the route of the call, and how large the batch is."""

    slots: int
    batch: int

    def route(self) -> Route | None:
        """Tenants of the call's rows; None: all are the base's."""

    def table(self) -> Table | None:
        """The hook on the input embeddings, if there is one."""


class View:
    """A module with other parameters: its own `forward` runs on them, and the module is not touched."""

    def __init__(self, module: nn.Module, **parameters: Any) -> None:
        self.__dict__.update(parameters)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, without hooks."""
        return type(self._module).forward(self, *args, **kwargs)  # type: ignore[arg-type]


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

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes on the device, of all slots."""

    @abstractmethod
    def takes(self, parts: Mapping[str, Any]) -> bool:
        """True if a tenant fits into the memory that there is; if not, `make` makes it anew."""

    @abstractmethod
    def make(self, parts: Mapping[str, Any]) -> None:
        """Make memory for all slots that this tenant fits into, too; slots that are filled stay so."""

    def _after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        route = self.where.route()
        return out if route is None else self.after(route, args, kwargs, out)

    @property
    def _place(self) -> torch.device:
        return next(x.device for x in (*self.module.parameters(), *self.module.buffers()))


class Signs(Hook):
    """On a linear layer: adds the product with each row's signs, and what its bias is more than the base's."""

    bits: Tensor | None = None
    scales: Tensor | None = None
    bias: Tensor | None = None

    def takes(self, parts: Mapping[str, Any]) -> bool:
        """As above."""
        matrix, held = parts.get("weight"), self.scales
        enough = matrix is None or (held is not None and _finest(held, matrix) == held.shape)
        return enough and ("bias" not in parts or self.bias is not None)

    def make(self, parts: Mapping[str, Any]) -> None:
        """As above."""
        matrix, place, slots = parts.get("weight"), self._place, self.where.slots
        if matrix is not None:
            shape = _finest(self.scales, matrix)
            planes, held = shape[0], self.bits
            bits = torch.zeros(planes, slots, *matrix.bits.shape[1:], dtype=torch.int32, device=place)
            scales = torch.zeros(planes, slots, *shape[2:], device=place)
            if held is not None and self.scales is not None:
                bits[: len(held)] = held
                scales[: len(held)] = _finer(self.scales, shape)
            self.bits, self.scales = bits, scales
        if "bias" in parts and self.bias is None:
            self.bias = torch.zeros(slots + 1, len(parts["bias"]), device=place)

    def put(self, slot: int, parts: Mapping[str, Any]) -> None:
        """As above; a slot without signs has scales of zero."""
        matrix = parts.get("weight")
        if self.bits is not None and self.scales is not None:
            self.scales[:, slot] = 0
            if matrix is not None:
                planes = len(matrix.bits)
                self.bits[:planes, slot] = matrix.bits.to(self.bits.device, non_blocking=True)
                scales = matrix.scales.to(self.bits.device).unsqueeze(1)
                self.scales[:planes, slot] = _finer(scales, (planes, *self.scales.shape[1:])).squeeze(1)
        if self.bias is not None:
            own: Tensor | None = getattr(self.module, "bias", None)
            more = parts["bias"].to(self.bias.device).float() if "bias" in parts else None
            if more is None:
                self.bias[slot + 1] = 0
            else:
                self.bias[slot + 1] = more if own is None else more - own.detach().float()

    def after(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """As above."""
        x = args[0] if args else kwargs["input"]
        flat, made = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        if self.bits is not None and self.scales is not None:
            for plane, slots in enumerate(route.planes_of(len(flat), flat.device)[: len(self.bits)]):
                made = delta_linear(flat, made, self.bits[plane], self.scales[plane], slots)
        if self.bias is not None:
            made = made + self.bias[route.index(len(flat), flat.device) + 1].to(made.dtype)
        return made.reshape(out.shape)

    @property
    def nbytes(self) -> int:
        """As above."""
        return sum(x.nbytes for x in (self.bits, self.scales, self.bias) if x is not None)


class Weights(Hook):
    """On a layer that is done once for each tenant, on all rows: output embeddings, and small layers like a router."""

    def __init__(self, module: nn.Module, where: Where) -> None:
        super().__init__(module, where)
        self.held: dict[int, dict[str, Tensor]] = {}

    def takes(self, parts: Mapping[str, Any]) -> bool:
        """As above: each slot has memory of its own."""
        return True

    def make(self, parts: Mapping[str, Any]) -> None:
        """As above."""

    def put(self, slot: int, parts: Mapping[str, Any]) -> None:
        """As above."""
        self.held.pop(slot, None)
        like = next(self.module.parameters())
        if parts:
            self.held[slot] = {name: x.to(like.device, like.dtype) for name, x in parts.items()}

    def after(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """All rows at once: a product over fewer rows may round otherwise, and a row would depend on the others."""
        for slot in route.distinct:
            if slot in self.held:
                out = _choose(route, slot, View(self.module, **self.held[slot])(*args, **kwargs), out)
        return out

    @property
    def nbytes(self) -> int:
        """As above."""
        return sum(x.nbytes for own in self.held.values() for x in own.values())


class Norm(Hook):
    """On a norm: done again with the weights of each row."""

    tables: dict[str, Tensor] | None = None

    def takes(self, parts: Mapping[str, Any]) -> bool:
        """As above."""
        return self.tables is not None

    def make(self, parts: Mapping[str, Any]) -> None:
        """As above: the base's weights are the first row."""
        own = {name: x.detach() for name, x in self.module.named_parameters(recurse=False)}
        self.tables = {name: x.expand(self.where.slots + 1, *x.shape).clone() for name, x in own.items()}

    def put(self, slot: int, parts: Mapping[str, Any]) -> None:
        """As above."""
        assert self.tables is not None
        for name, table in self.tables.items():
            table[slot + 1] = parts[name].to(table.device) if name in parts else table[0]

    def after(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """As above."""
        assert self.tables is not None
        x = args[0] if args else next(iter(kwargs.values()))
        index = route.index(len(x), x.device) + 1
        rows = {}
        for name, table in self.tables.items():
            each = table[index]
            rows[name] = each.reshape(len(x), *(1,) * (x.ndim - each.ndim), *each.shape[1:])
        if not isinstance(self.module, (nn.LayerNorm, nn.RMSNorm)):
            return View(self.module, **rows)(*args, **kwargs)
        bare = View(self.module, weight=None, bias=None)(x)  # torch's own takes one weight for all rows
        scaled = bare * rows["weight"]
        return scaled + rows["bias"] if "bias" in rows else scaled

    @property
    def nbytes(self) -> int:
        """As above."""
        return sum(x.nbytes for x in (self.tables or {}).values())


class Table(Hook):
    """On an embedding: rows are looked up in their tenant's table."""

    table: Tensor | None = None

    def __init__(self, module: nn.Module, where: Where) -> None:
        super().__init__(module, where)
        self.own: dict[int, int] = {}
        """Rows of the table of each slot that has one."""
        self._asked: Tensor | None = None
        self._mine: Tensor | None = None
        self.handles.append(module.register_forward_pre_hook(self._before))

    def takes(self, parts: Mapping[str, Any]) -> bool:
        """As above."""
        return "weight" not in parts or (self.table is not None and self.table.shape[1] >= len(parts["weight"]))

    def make(self, parts: Mapping[str, Any]) -> None:
        """As above."""
        like: Any = self.module.weight
        rows, columns = parts["weight"].shape
        held = self.table
        if held is not None:
            rows = max(rows, held.shape[1])
        self.table = torch.zeros(self.where.slots, rows, columns, dtype=like.dtype, device=like.device)
        if held is not None:
            self.table[:, : held.shape[1]] = held
        self._mine = torch.zeros(self.where.slots + 1, dtype=torch.bool, device=like.device)
        for slot in self.own:
            self._mine[slot + 1] = True

    def put(self, slot: int, parts: Mapping[str, Any]) -> None:
        """As above."""
        weight = parts.get("weight")
        self.own.pop(slot, None)
        if self.table is None or self._mine is None:
            return
        self._mine[slot + 1] = weight is not None
        if weight is not None:
            self.table[slot, : len(weight)] = weight.to(self.table.device, self.table.dtype)
            self.own[slot] = len(weight)

    def weight(self, slot: int) -> Tensor | None:
        """A tenant's own table, `[rows, columns]`, or None."""
        return None if self.table is None or slot not in self.own else self.table[slot, : self.own[slot]]

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The base looks up a token that it has where a tenant may have more."""
        route = self.where.route()
        if route is None or self._mine is None or not args:
            return None
        ids = args[0] if len(args[0]) % len(route.names) == 0 else args[0].expand(self.where.batch, -1)
        self._asked = ids
        return torch.where(self._has(route, ids), 0, ids), *args[1:]

    def after(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """As above; a token that nobody has is out of range here as it is in the base."""
        ids, self._asked = self._asked, None
        if ids is None or self.table is None:
            return out
        slots, rows = self.table.shape[:2]
        slot = _wide(route.index(len(ids), ids.device), ids.ndim)
        place = torch.where(ids < rows, slot.clamp(min=0) * rows + ids, slots * rows)
        has = self._has(route, ids)
        found = View(self.module, weight=self.table.flatten(0, 1))(torch.where(has, place, 0))
        return torch.where(has.unsqueeze(-1), found, out)

    def _has(self, route: Route, ids: Tensor) -> Tensor:
        """Whether the tenant of a row has a table, of the shape of the rows."""
        assert self._mine is not None
        return _wide(self._mine[route.index(len(ids), ids.device) + 1], ids.ndim)

    @property
    def nbytes(self) -> int:
        """As above."""
        return 0 if self.table is None else self.table.nbytes


class Head(Weights):
    """On output embeddings: as `Weights`, and a tenant with tied embeddings reads its own table of them.

    Logits are as wide as the largest vocabulary of the batch; tokens that a row's tenant does not have get -inf.
    """

    def __init__(self, module: nn.Module, where: Where) -> None:
        super().__init__(module, where)
        self.tied: set[int] = set()

    def put(self, slot: int, parts: Mapping[str, Any]) -> None:
        """As above; a part `tied` says that the table of embeddings is read."""
        self.tied.discard(slot)
        if "tied" in parts:
            self.tied.add(slot)
        super().put(slot, {name: x for name, x in parts.items() if name != "tied"})

    def after(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """As above."""
        table = self.where.table()
        for slot in route.distinct:
            own = dict(self.held.get(slot, {}))
            tied = None if table is None or slot not in self.tied else table.weight(slot)
            if tied is not None:
                own["weight"] = tied
            if own:
                found = View(self.module, **own)(*args, **kwargs)
                width = max(out.shape[-1], found.shape[-1])
                out = _choose(route, slot, *(F.pad(x, (0, width - x.shape[-1]), value=-torch.inf) for x in (found, out)))
        return out


def _choose(route: Route, slot: int, found: Any, out: Any) -> Any:
    """Rows of one slot from `found`, the others from `out`; tuples part by part."""
    if isinstance(out, tuple):
        return tuple(_choose(route, slot, *pair) for pair in zip(found, out, strict=True))
    return torch.where(_wide(route.index(len(out), out.device) == slot, out.ndim), found, out)


def _wide(rows: Tensor, dims: int) -> Tensor:
    """`[rows]` as `[rows, 1, ...]` with so many dimensions."""
    return rows.reshape(-1, *(1,) * (dims - 1))


def _finest(held: Tensor | None, matrix: Matrix) -> torch.Size:
    """Shape of scales `[P, S, 1 or N, groups]` into which those that there are and those of a matrix fit."""
    planes, rows, groups = matrix.scales.shape
    if held is not None:
        planes, rows, groups = max(planes, len(held)), max(rows, held.shape[2]), math.lcm(groups, held.shape[3])
    return torch.Size((planes, 0 if held is None else held.shape[1], rows, groups))


def _finer(scales: Tensor, shape: Any) -> Tensor:
    """Scales `[P, S, 1 or N, groups]` said for finer grains; planes as they are."""
    repeated = scales.repeat_interleave(shape[-1] // scales.shape[-1], -1)
    return repeated.expand(*repeated.shape[:2], shape[-2], shape[-1])
