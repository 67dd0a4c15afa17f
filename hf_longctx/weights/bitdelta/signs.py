"""On a linear layer: the signs of all tenants, and what their biases are more than the base's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.delta import delta_linear
from .bits import Matrix
from .family import Family
from .hooks import Hook, Where
from .route import Route
from .split import local_weight, whole_weight


class Signs(Hook):
    """On a linear layer: adds the product with each row's signs, and what its bias is more than the base's.

    Attributes:
        bits: `[S, P, N, K / 32]`, int32, or None: no tenant has signs here.
        scales: `[S, P, 1 or N, groups]`, float32; zero where a slot has fewer planes, or none.
        bias: `[S + 1, N]`, float32, zero for the base; None: no tenant has another bias.
    """

    bits: Tensor | None = None
    scales: Tensor | None = None
    bias: Tensor | None = None

    def __init__(self, module: nn.Module, where: Where) -> None:
        super().__init__(module, where)
        self.joined = False
        self.family = Family([self])
        self.part = where.part(module)
        before = vars(module).get("forward")
        if type(module) is nn.Linear and (before is None or hasattr(before, "stock")):
            module.__dict__["forward"] = _Joined(self, before)

    def remove(self) -> None:
        """As above."""
        super().remove()
        own = self.module.__dict__.pop("forward", None)
        if isinstance(own, _Joined):
            own = own.before
        if own is not None:
            self.module.__dict__["forward"] = own

    def takes(self, parts: Mapping[str, Any]) -> bool:
        """As above."""
        matrix, held = self._own(parts)[0], self.scales
        enough = matrix is None or (held is not None and finest(held, matrix) == held.shape[1:])
        return enough and ("bias" not in parts or self.bias is not None)

    def make(self, parts: Mapping[str, Any]) -> None:
        """As above."""
        (matrix, bias), place, slots = self._own(parts), self._place, self.where.slots
        if matrix is not None:
            shape = finest(self.scales, matrix)
            bits = torch.zeros(slots, shape[0], *matrix.bits.shape[1:], dtype=torch.int32, device=place)
            scales = torch.zeros(slots, *shape, device=place)
            if self.bits is not None and self.scales is not None:
                bits[:, : self.bits.shape[1]] = self.bits
                scales[:, : self.bits.shape[1]] = finer(self.scales, shape)
            self.bits, self.scales = bits, scales
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
        if self.bits is not None and self.scales is not None:
            self.scales[slot] = 0
            if matrix is not None:
                planes = len(matrix.bits)
                self.bits[slot, :planes] = matrix.bits.to(self.bits.device)
                self.scales[slot, :planes] = finer(matrix.scales.to(self.bits.device), self.scales.shape[1:])
        if self.bias is not None:
            self.bias[slot + 1] = 0
            if bias is not None:
                own: Tensor | None = getattr(self.module, "bias", None)
                there = whole_weight if self.part is None else local_weight
                less = 0 if own is None else there(own.detach()).float()
                self.bias[slot + 1] = bias.to(self.bias.device).float() - less

    def after(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """As above."""
        x = args[0] if args else kwargs["input"]
        flat, made = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        if not self.joined and self.bits is not None:
            arguments = self.arguments(route, flat)
            if self.part is None or not self.part.columns:
                made = delta_linear(flat, made, *arguments)
            else:  # the base's outputs are added up already
                made = made + self.part.total(delta_linear(flat, torch.zeros_like(made), *arguments))
        self.joined = False
        if self.bias is not None:
            made = made + self.bias[route.index(len(flat), flat.device) + 1].to(made.dtype)
        return made.reshape(out.shape)

    def arguments(self, route: Route, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bits, scales and slots, as `delta_linear` takes them, for an input `[R, K]`."""
        assert self.bits is not None
        assert self.scales is not None
        scales = self.scales.flatten(0, 1)
        slots = route.slots_of(len(flat), self.bits.shape[1], flat.device)
        return self.bits.flatten(0, 1), scales.double() if flat.dtype == torch.float64 else scales, slots

    def buffers(self) -> list[Tensor]:
        """As above."""
        return [x for x in (self.bits, self.scales, self.bias) if x is not None]


@dataclass(eq=False)
class _Joined:
    """In place of a layer's `forward`: where it pays, the product with the weights and that with the signs are one."""

    hook: Signs
    before: Any  # a short cut that was there

    def __call__(self, input: Tensor) -> Tensor:
        """The layer's output; where the call has tenants and a backend can, with their signs."""
        hook, module = self.hook, self.hook.module
        route = None if torch.compiler.is_compiling() else hook.where.route()  # then the hook itself adds them
        if route is not None and hook.bits is not None and hook.part is None:
            made = hook.family.take(hook, input, route)
            if made is not None:
                hook.joined = True
                return made
        return self.before(input) if self.before else nn.Linear.forward(module, input)  # type: ignore[arg-type]


def finest(held: Tensor | None, matrix: Matrix) -> torch.Size:
    """Shape `[P, 1 or N, groups]` into which scales that there are, `[S, P, 1 or N, groups]`, and a matrix's fit."""
    planes, rows, groups = matrix.scales.shape
    if held is not None:
        planes, rows, groups = max(planes, held.shape[1]), max(rows, held.shape[2]), math.lcm(groups, held.shape[3])
    return torch.Size((planes, rows, groups))


def finer(scales: Tensor, shape: torch.Size) -> Tensor:
    """Scales `[..., P, 1 or N, groups]` said for the finer rows and groups of a shape; planes as they are."""
    repeated = scales.repeat_interleave(shape[-1] // scales.shape[-1], -1)
    return repeated.expand(*repeated.shape[:-2], shape[-2], shape[-1])
