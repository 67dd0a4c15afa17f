"""On norms and small layers: what tenants have there in place of what the base has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import Hook, Where, choose, wide, with_parameters
from .route import Route


class Weights(Hook):
    """On a layer that is done once for each tenant, on all rows: a router, and output embeddings of many rows."""

    def __init__(self, module: nn.Module, where: Where) -> None:
        super().__init__(module, where)
        self.held: dict[int, dict[str, Any]] = {}

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
    """On a norm: a short cut of it takes the weights of each row; without one it is done again with them."""

    tables: dict[str, Tensor] | None = None
    _given: Tensor | None = None

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

    def weights_of_rows(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the short cut asks for: weights, and which of them each row has; None: the base's."""
        route: Route | None = self.where.route()
        if route is None or self.tables is None:
            return self.module.weight, None  # type: ignore[return-value]
        self._given = x
        return self.tables["weight"], route.index(len(x), x.device, 0)

    def after(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """As above."""
        x = args[0] if args else next(iter(kwargs.values()))
        given, self._given = self._given, None
        if given is x:
            return out
        assert self.tables is not None
        index = route.index(len(x), x.device, 0)
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
