"""On embeddings, norms, heads and small layers: what tenants have there in place of what the base has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .hooks import Hook, Where, choose, wide, with_parameters
from .route import Route


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
                out = choose(route, slot, with_parameters(self.module, **self.held[slot])(*args, **kwargs), out)
        return out

    def buffers(self) -> list[Tensor]:
        """As above."""
        return [x for own in self.held.values() for x in own.values()]


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
            return with_parameters(self.module, **rows)(*args, **kwargs)
        made = with_parameters(self.module, weight=None, bias=None)(x)  # torch's own takes one weight for all rows
        made = made * rows["weight"] + rows.get("bias", 0)
        return torch.where(wide(index == 0, x.ndim), out, made)

    def buffers(self) -> list[Tensor]:
        """As above."""
        return list((self.tables or {}).values())


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
        return ids.masked_fill(self._has(route, ids), 0), *args[1:]

    def after(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """As above; a token that nobody has is out of range here as it is in the base."""
        ids, self._asked = self._asked, None
        if ids is None or self.table is None:
            return out
        slots, rows = self.table.shape[:2]
        slot = wide(route.index(len(ids), ids.device), ids.ndim)
        place = (slot.clamp(min=0) * rows + ids).masked_fill(ids >= rows, slots * rows)
        has = self._has(route, ids)
        found = with_parameters(self.module, weight=self.table.flatten(0, 1))(place.masked_fill(~has, 0))
        return torch.where(has.unsqueeze(-1), found, out)

    def _has(self, route: Route, ids: Tensor) -> Tensor:
        """Whether the tenant of a row has a table, of the shape of the rows."""
        assert self._mine is not None
        return wide(self._mine[route.index(len(ids), ids.device) + 1], ids.ndim)

    def buffers(self) -> list[Tensor]:
        """As above."""
        return [x for x in (self.table, self._mine) if x is not None]


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
                found = with_parameters(self.module, **own)(*args, **kwargs)
                width = max(out.shape[-1], found.shape[-1])
                out = choose(route, slot, *(F.pad(x, (0, width - x.shape[-1]), value=-torch.inf) for x in (found, out)))
        return out
