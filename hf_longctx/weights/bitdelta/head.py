"""On output embeddings: each row times its tenant's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.tables import FEW, linear_of_rows
from .codes import Codes
from .hooks import Ahead, Where, choose, with_parameters
from .route import Route
from .tables import Weights


class Head(Ahead, Weights):
    """As `Weights`, and a tenant with tied embeddings reads its own table of them; few rows are one call.

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

    def instead(self, input: Tensor, route: Route) -> Tensor | None:
        """As above, where a backend takes all tables at once."""
        rows = input.shape[:-1].numel()
        module: Any = self.module
        if not 0 < rows <= FEW or module.bias is not None or module.weight.dtype != input.dtype:
            return None
        each = {slot: self._parts(slot) for slot in route.distinct}
        if not any(each.values()) or any("bias" in own for own in each.values()):
            return None
        tables: list[Tensor | Codes] = [module.weight]
        number = {-1: 0}
        for slot, own in each.items():
            number[slot] = len(tables) if own else 0
            tables += own.values()
        numbers = [number[slot] for slot in route.slots for _ in range(rows // len(route.slots))]
        made = _product(input.reshape(rows, -1), tables, numbers)
        return None if made is None else made.view(*input.shape[:-1], -1)

    def after(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """As above."""
        for slot in () if self.done else route.distinct:
            own = self._parts(slot)
            if own:
                given = {name: x.floats(out.dtype) if isinstance(x, Codes) else x for name, x in own.items()}
                found = with_parameters(self.module, **given)(*args, **kwargs)
                width = max(out.shape[-1], found.shape[-1])
                out = choose(route, slot, *(F.pad(x, (0, width - x.shape[-1]), value=-torch.inf) for x in (found, out)))
        self.done = False
        return out

    def _parts(self, slot: int) -> dict[str, Any]:
        """What a tenant has here."""
        table = self.where.table()
        own = dict(self.held.get(slot, {}))
        tied = None if table is None or slot not in self.tied else table.weight(slot)
        return own if tied is None else {**own, "weight": tied}

    def buffers(self) -> list[Tensor]:
        """As above."""
        each = [x for own in self.held.values() for x in own.values()]
        return [y for x in each for y in ((x.values, x.scale) if isinstance(x, Codes) else (x,))]


def _product(x: Tensor, tables: Sequence[Tensor | Codes], numbers: Sequence[int]) -> Tensor | None:
    """Rows times the tables of their numbers, those alone that there is a number of; None: no backend does that."""
    used = sorted(set(numbers))
    chosen = [tables[number] for number in used]
    weights = [table.values if isinstance(table, Codes) else table for table in chosen]
    scales = [table.scale if isinstance(table, Codes) else None for table in chosen]
    places = [used.index(number) for number in numbers]
    return linear_of_rows(x, weights, scales, places, max(len(table) for table in tables))
