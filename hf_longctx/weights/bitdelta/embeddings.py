"""On embeddings: what tenants have there in place of the base's table, in 16 bits or in int8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .codes import Codes
from .hooks import Hook, Where, wide, with_parameters
from .route import Route


class Rows:
    """Tables of all slots of one kind: a tenant reads its own as it is stored, whatever the others have.

    Attributes:
        values: `[S, rows, columns]`, the dtype of the base's table, or int8.
        scale: `[S, rows, 1]`, float32, of int8; else None.
        own: rows of the table of each slot that has one.
        mine: `[S + 1]`, bool, whether a slot has one; the first is the base.
    """

    values: Tensor
    scale: Tensor | None

    def __init__(self, slots: int, rows: int, like: Tensor, eight: bool, before: Rows | None) -> None:
        dtype, place, columns = torch.int8 if eight else like.dtype, like.device, like.shape[1]
        if before is not None:
            rows = max(rows, before.values.shape[1])
        self.values = torch.zeros(slots, rows, columns, dtype=dtype, device=place)
        self.scale = torch.zeros(slots, rows, 1, device=place) if eight else None
        self.own: dict[int, int] = {}
        self.mine = torch.zeros(slots + 1, dtype=torch.bool, device=place)
        if before is not None:
            for slot in before.own:
                self.put(slot, before.table(slot))

    def put(self, slot: int, weight: Tensor | Codes | None) -> None:
        """Fill a slot, or free it."""
        self.own.pop(slot, None)
        self.mine[slot + 1] = weight is not None
        if weight is None:
            return
        self.values[slot, : len(weight)] = weight.values if isinstance(weight, Codes) else weight
        if self.scale is not None and isinstance(weight, Codes):
            self.scale[slot, : len(weight)] = weight.scale
        self.own[slot] = len(weight)

    def table(self, slot: int) -> Tensor | Codes | None:
        """A tenant's own table, `[rows, columns]`, or None."""
        if slot not in self.own:
            return None
        values = self.values[slot, : self.own[slot]]
        return values if self.scale is None else Codes(values, self.scale[slot, : self.own[slot]])

    def look_up(self, module: nn.Module, place: Tensor) -> Tensor:
        """What an embedding makes of rows of all tables, one behind the other."""
        values = self.values.flatten(0, 1)
        if self.scale is None:
            found: Tensor = with_parameters(module, weight=values)(place)
            return found
        like: Any = module.weight
        some = Codes(values[place].flatten(0, -2), self.scale.flatten(0, 1)[place].flatten(0, -2)).floats(like.dtype)
        found = with_parameters(module, weight=some)(torch.arange(len(some), device=place.device).view(place.shape))
        return found


class Table(Hook):
    """On an embedding: rows are looked up in their tenant's table.

    Attributes:
        kinds: tables in 16 bits, False, and in int8, True, where a tenant has such ones.
    """

    def __init__(self, module: nn.Module, where: Where) -> None:
        super().__init__(module, where)
        self.kinds: dict[bool, Rows] = {}
        self._asked: Tensor | None = None
        self.handles.append(module.register_forward_pre_hook(self._before))

    def takes(self, parts: Mapping[str, Any]) -> bool:
        """As above."""
        weight = parts.get("weight")
        held = self.kinds.get(isinstance(weight, Codes))
        return weight is None or (held is not None and held.values.shape[1] >= len(weight))

    def make(self, parts: Mapping[str, Any]) -> None:
        """As above."""
        like: Any = self.module.weight
        weight = parts["weight"]
        eight = isinstance(weight, Codes)
        self.kinds[eight] = Rows(self.where.slots, len(weight), like.detach(), eight, self.kinds.get(eight))

    def put(self, slot: int, parts: Mapping[str, Any]) -> None:
        """As above."""
        weight = parts.get("weight")
        for eight, rows in self.kinds.items():
            mine = weight is not None and isinstance(weight, Codes) == eight
            rows.put(slot, weight.to(rows.values.device, rows.values.dtype) if mine else None)  # type: ignore[union-attr]

    def weight(self, slot: int) -> Tensor | Codes | None:
        """A tenant's own table, `[rows, columns]`, or None."""
        return next((x for x in (rows.table(slot) for rows in self.kinds.values()) if x is not None), None)

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The base looks up a token that it has where a tenant may have more."""
        route = self.where.route()
        if route is None or not self.kinds or not args:
            return None
        ids = args[0] if len(args[0]) % len(route.names) == 0 else args[0].expand(self.where.batch, -1)
        self._asked = ids
        for rows in self.kinds.values():
            ids = ids.masked_fill(_has(rows, route, ids), 0)
        return ids, *args[1:]

    def after(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """As above; a token that nobody has is out of range here as it is in the base."""
        ids, self._asked = self._asked, None
        if ids is None:
            return out
        slot = wide(route.index(len(ids), ids.device), ids.ndim)
        for held in self.kinds.values():
            slots, rows = held.values.shape[:2]
            has = _has(held, route, ids)
            place = (slot.clamp(min=0) * rows + ids).masked_fill(ids >= rows, slots * rows)
            out = torch.where(has.unsqueeze(-1), held.look_up(self.module, place.masked_fill(~has, 0)), out)
        return out

    def buffers(self) -> list[Tensor]:
        """As above."""
        each = [x for rows in self.kinds.values() for x in (rows.values, rows.scale, rows.mine)]
        return [x for x in each if x is not None]


def _has(rows: Rows, route: Route, ids: Tensor) -> Tensor:
    """Whether the tenant of a row has such a table, of the shape of the rows."""
    return wide(rows.mine[route.index(len(ids), ids.device, 0)], ids.ndim)
