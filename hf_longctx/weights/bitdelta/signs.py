"""On a linear layer: the signs of all tenants, and what their biases are more than the base's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.delta import delta_linear
from .bits import Matrix
from .family import Family
from .hooks import Ahead, Where
from .route import Route
from .split import local_weight, whole_weight

Shape = tuple[int, bool, int]
"""Planes, whether each output has scales of its own, and groups."""

PLAIN: Shape = (1, False, 1)
"""One bit a weight and one scale for all: what has a kernel of its own. Tenants without signs on a layer go along."""


class Kind(NamedTuple):
    """Rows of a call whose tenants have matrices of one shape on a layer: what is done for them is one call.

    Attributes:
        shape: of their scales.
        own: planes of each name of the route; 0 for those of other kinds, and the base.
    """

    shape: Shape
    own: tuple[int, ...]


class Signs(Ahead):
    """On a linear layer: adds the product with each row's signs, and what its bias is more than the base's.

    Which kernels do a row's product depends on its own tenant's matrix alone, not on who else is there.

    Attributes:
        bits: `[S, P, N, K / 32]`, int32, or None: no tenant has signs here.
        scales: `[S, P, 1 or N, groups]`, float32, by whether there are N, and groups; zero for slots with others.
        shapes: of the matrix of each slot that has one.
        bias: `[S + 1, N]`, float32, zero for the base; None: no tenant has another bias.
    """

    bits: Tensor | None = None
    bias: Tensor | None = None

    def __init__(self, module: nn.Module, where: Where) -> None:
        super().__init__(module, where)
        self.scales: dict[tuple[bool, int], Tensor] = {}
        self.shapes: dict[int, Shape] = {}
        self.family = Family([self])
        self.part = where.part(module)

    def takes(self, parts: Mapping[str, Any]) -> bool:
        """As above."""
        matrix = self._own(parts)[0]
        enough = matrix is None or (
            self.bits is not None and self.bits.shape[1] >= len(matrix.bits) and _grain(matrix) in self.scales
        )
        return enough and ("bias" not in parts or self.bias is not None)

    def make(self, parts: Mapping[str, Any]) -> None:
        """As above."""
        (matrix, bias), place, slots, held = self._own(parts), self._place, self.where.slots, self.bits
        if matrix is not None:
            before = 0 if held is None else held.shape[1]
            planes = max(len(matrix.bits), before)
            if held is None or planes > before:
                self.bits = torch.zeros(slots, planes, *matrix.bits.shape[1:], dtype=torch.int32, device=place)
                if held is not None:
                    self.bits[:, :before] = held
            for grain in dict.fromkeys((*self.scales, PLAIN[1:], _grain(matrix))):
                rows, old = matrix.bits.shape[1] if grain[0] else 1, self.scales.get(grain)
                scales = torch.zeros(slots, planes, rows, grain[1], device=place)
                if old is not None:
                    scales[:, :before] = old
                self.scales[grain] = scales
        if bias is not None and self.bias is None:
            self.bias = torch.zeros(slots + 1, len(bias), device=place)

    def _own(self, parts: Mapping[str, Any]) -> tuple[Matrix | None, Tensor | None]:
        """Signs and bias of the channels that are here."""
        matrix, bias = parts.get("weight"), parts.get("bias")
        if self.part is None:
            return matrix, bias
        return matrix and self.part.matrix(matrix), None if bias is None else self.part.vector(bias)

    def put(self, slot: int, parts: Mapping[str, Any]) -> None:
        """As above."""
        matrix, bias = self._own(parts)
        self.shapes.pop(slot, None)
        for scales in self.scales.values():
            scales[slot] = 0
        if matrix is not None and self.bits is not None:
            planes, grain = len(matrix.bits), _grain(matrix)
            self.bits[slot, :planes] = matrix.bits.to(self.bits.device)
            self.scales[grain][slot, :planes] = matrix.scales.to(self.bits.device)
            self.shapes[slot] = planes, *grain
        if self.bias is not None:
            self.bias[slot + 1] = 0
            if bias is not None:
                own: Tensor | None = getattr(self.module, "bias", None)
                there = whole_weight if self.part is None else local_weight
                less = 0 if own is None else there(own.detach()).float()
                self.bias[slot + 1] = bias.to(self.bias.device).float() - less

    def instead(self, input: Tensor, route: Route) -> Tensor | None:
        """As above."""
        return None if self.bits is None or self.part is not None else self.family.take(self, input, route)

    def after(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """As above."""
        x = args[0] if args else kwargs["input"]
        flat, made = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        for kind in () if self.done else self.kinds(route):
            arguments = self.arguments(route, flat, kind)
            if self.part is None or not self.part.columns:
                made = delta_linear(flat, made, *arguments)
            else:  # the base's outputs are added up already
                made = made + self.part.total(delta_linear(flat, torch.zeros_like(made), *arguments))
        self.done = False
        if self.bias is not None:
            made = made + self.bias[route.index(len(flat), flat.device, 0)].to(made.dtype)
        return made.reshape(out.shape)

    def kinds(self, route: Route) -> tuple[Kind, ...]:
        """Those of the tenants of a call, `PLAIN` first; none where nobody has signs here."""
        found: tuple[Kind, ...] | None = route.known.get(self)
        if found is None:
            each = [None if slot < 0 else self.shapes.get(slot, PLAIN) for slot in route.slots]
            planes = [self.shapes[slot][0] if slot in self.shapes else 0 for slot in route.slots]
            shapes = sorted({own for own in each if own is not None}) if self.bits is not None else []
            found = route.known[self] = tuple(
                Kind(shape, tuple(many if own == shape else 0 for own, many in zip(each, planes, strict=True)))
                for shape in shapes
            )
        return found

    def arguments(self, route: Route, flat: Tensor, kind: Kind) -> tuple[Tensor, Tensor, Tensor]:
        """Bits, scales and slots of rows of a kind, as `delta_linear` takes them, for an input `[R, K]`."""
        assert self.bits is not None
        planes, apart = kind.shape[0], self.bits.shape[1]
        scales = self.scales[kind.shape[1:]].flatten(0, 1)
        slots = route.slots_of(len(flat), kind.own, apart, planes, flat.device)
        return self.bits.flatten(0, 1), scales.double() if flat.dtype == torch.float64 else scales, slots

    def buffers(self) -> list[Tensor]:
        """As above."""
        return [x for x in (self.bits, *self.scales.values(), self.bias) if x is not None]


def _grain(matrix: Matrix) -> tuple[bool, int]:
    """Which scales a plane has."""
    return matrix.scales.shape[1] > 1, matrix.scales.shape[2]
