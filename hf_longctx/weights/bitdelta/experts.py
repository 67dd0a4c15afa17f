"""On the experts of a mixture: signs of each expert's matrices. Files have them one by one, models in two tensors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.delta import delta_linear
from ...kernels.experts import Sorted, combine_experts, sort_experts
from .bits import Matrix
from .hooks import Hook, wide
from .route import Route

EXPERT = re.compile(r"(?P<module>.+\.experts)\.(?P<number>\d+)\.(?P<part>\w+)\.weight")
"""The name of one matrix of one expert in a file."""

_HALF = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}
"""Which half of `gate_up_proj` a matrix is."""

_DOWN = ("down_proj", "w2")

DEVICES = {"cuda"}
"""Types of devices that a host does not wait for."""
MOST_SLOTS = 4096
"""Of a call of `delta_linear` on those."""


class Spot(NamedTuple):
    """Where in a model a matrix of an expert is."""

    tensor: str
    number: int
    start: int
    stop: int
    inputs: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(N, K)`."""
        return self.stop - self.start, self.inputs

    def view(self, module: Any) -> Tensor:
        """It, in the module's own memory."""
        whole: Tensor = getattr(module, self.tensor)
        return whole[self.number, self.start : self.stop]


def spot(module: Any, number: int, part: str) -> Spot | None:
    """Where a matrix is in a module of experts; None: it has no such thing, or holds it in another form."""
    both, down = sizes_of(module, "gate_up_proj"), sizes_of(module, "down_proj")
    plain = not getattr(module, "is_transposed", False) and getattr(module, "is_concatenated", True)
    if both is None or down is None or not plain or getattr(module, "has_bias", False) or number >= both[0]:
        return None
    if part in _DOWN:
        return Spot("down_proj", number, 0, *down[1:])
    half = both[1] // 2
    here = part in _HALF
    return Spot("gate_up_proj", number, _HALF[part] * half, (_HALF[part] + 1) * half, both[2]) if here else None


def sizes_of(module: Any, tensor: str) -> tuple[int, int, int] | None:
    """`(E, N, K)` of what is a tensor of a module of experts, in floating point or, with `sizes`, of few bits."""
    own: Any = getattr(module, tensor, None)
    if isinstance(own, nn.Parameter):
        return (*own.shape,) if own.ndim == 3 else None
    found: tuple[int, int, int] | None = getattr(module, "sizes", {}).get(tensor)
    return found


def find(model: Any, name: str) -> tuple[Any, Spot] | None:
    """Module and place of a matrix that a file names, if it is one of an expert of this model."""
    found = EXPERT.fullmatch(name)
    if found is None:
        return None
    try:
        module = model.get_submodule(found["module"])
    except AttributeError:
        return None
    place = spot(module, int(found["number"]), found["part"])
    return None if place is None else (module, place)


class _Rows(NamedTuple):
    """Tokens of a call, once for each of their experts, sorted by those."""

    by: Sorted
    token: Tensor
    expert: Tensor
    route: Route
    total: int


class Experts(Hook):
    """Adds to each expert's products those with the signs of the row's tenant.

    What is between the two products is not linear: the experts of such rows are computed anew, after the base's own.

    Attributes:
        bits: by tensor of the module, `[E, S, P, N, K / 32]`, int32.
        scales: likewise `[E, S, P, N, groups]`, float32.
    """

    def __init__(self, module: nn.Module, where: Any) -> None:
        super().__init__(module, where)
        self.bits: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}

    @property
    def asks(self) -> bool:
        """As `Hook` says: expert by expert, it looks whose rows there are."""
        return not self._at_once

    @property
    def _at_once(self) -> bool:
        """Whether the products of all experts are one call, which no value on the host is needed for."""
        weight, place = getattr(self.module, "gate_up_proj", None), self._place
        if place.type not in DEVICES or any(math.prod(held.shape[:3]) > MOST_SLOTS for held in self.bits.values()):
            return False
        return weight is None or (weight.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"))

    def takes(self, parts: Mapping[str, Any]) -> bool:
        """As `Hook` says."""
        return all(
            at.tensor in self.scales and finest(self.scales[at.tensor][0], m)[::2] == self.scales[at.tensor].shape[2::2]
            for at, m in self._spots(parts)
        )

    def make(self, parts: Mapping[str, Any]) -> None:
        """As `Hook` says; scales are of rows at least, as two matrices lie in one tensor."""
        slots = self.where.slots
        for at, matrix in self._spots(parts):
            held = self.scales.get(at.tensor)
            whole = sizes_of(self.module, at.tensor)
            assert whole is not None
            planes, _, groups = finest(None if held is None else held[0], matrix)
            if held is not None and held.shape[2::2] == (planes, groups):
                continue
            (experts, rows, inputs), device = whole, self._place
            bits = torch.zeros(experts, slots, planes, rows, inputs // 32, dtype=torch.int32, device=device)
            scales = torch.zeros(experts, slots, planes, rows, groups, device=device)
            if held is not None:
                bits[:, :, : held.shape[2]] = self.bits[at.tensor]
                scales[:, :, : held.shape[2]] = finer(held, scales.shape)
            self.bits[at.tensor], self.scales[at.tensor] = bits, scales

    def put(self, slot: int, parts: Mapping[str, Any]) -> None:
        """As `Hook` says."""
        for scales in self.scales.values():
            scales[:, slot] = 0
        for at, matrix in self._spots(parts):
            rows, planes = slice(at.start, at.stop), len(matrix.bits)
            scales = self.scales[at.tensor]
            self.bits[at.tensor][at.number, slot, :planes, rows] = matrix.bits.to(scales.device)
            own = finer(matrix.scales.to(scales.device), torch.Size((at.stop - at.start, scales.shape[-1])))
            scales[at.number, slot, :planes, rows] = own

    def after(self, route: Route, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """As `Hook` says."""
        names = ("hidden_states", "top_k_index", "top_k_weights")
        x, index, weights = (args[n] if n < len(args) else kwargs[name] for n, name in enumerate(names))
        sizes = sizes_of(self.module, "gate_up_proj")
        assert sizes is not None
        if self._at_once and not torch.is_grad_enabled():
            made = self._all(route, x, index, weights, sizes[0])
            return torch.where(wide(route.index(len(out), out.device) < 0, out.ndim), out, made)
        made = torch.zeros_like(x)
        for number in index.unique().tolist():
            if number < sizes[0]:
                token, choice = torch.where(index == number)
                inner = self._gate(self._linear("gate_up_proj", number, x[token], token, route, len(x)))
                each = self._linear("down_proj", number, inner, token, route, len(x)) * weights[token, choice, None]
                made.index_add_(0, token, each.to(made.dtype))
        return torch.where(wide(route.index(len(x), x.device) < 0, x.ndim), out, made)

    def _all(self, route: Route, x: Tensor, index: Tensor, weights: Tensor, experts: int) -> Tensor:
        """The same of all experts at once, rows sorted by them."""
        ids, top = index.reshape(-1).long(), index.shape[1]
        by = sort_experts(ids, experts)
        order = by.order.long()
        rows = _Rows(by, order // top, ids[order], route, len(x))
        inner = self._gate(self._sorted("gate_up_proj", x[order // top], rows))
        return combine_experts(self._sorted("down_proj", inner, rows), by, weights.contiguous())

    def _sorted(self, name: str, x: Tensor, rows: _Rows) -> Tensor:
        """One product of each expert, for sorted rows; its slots are those of all experts, one behind the other."""
        weight, module = getattr(self.module, name, None), self.module
        out: Tensor = (
            module.products(name, x, rows.by)  # type: ignore[operator]
            if weight is None
            else F.grouped_mm(x, weight.transpose(1, 2), offs=rows.by.ends)
        )
        if name not in self.bits:
            return out
        bits, scales = self.bits[name].flatten(0, 2), self.scales[name].flatten(0, 2)
        planes = self.bits[name].shape[2]
        own = rows.route.slots_of(rows.total, rows.route.planes, planes, planes, x.device)[rows.token]
        first = (rows.expert * (len(bits) // len(self.bits[name])))[:, None]
        there = (own >= 0) & (first >= 0) & (first < len(bits))  # some rows may be of no expert
        return delta_linear(x, out, bits, scales, torch.where(there, own + first, -1).int())

    def trained(self, parts: Mapping[str, Any]) -> list[nn.Parameter]:
        """Scales of the only slot, as parameters; what a matrix has one scale for gets one gradient, and stays alike.

        Args:
            parts: of the tenant.
        """
        for name, scales in self.scales.items():
            alike: dict[tuple[int, int, torch.Size], list[int]] = {}
            for at, matrix in self._spots(parts):
                if at.tensor == name:
                    alike.setdefault((at.start, at.stop, matrix.scales.shape), []).append(at.number)
            self.scales[name] = made = nn.Parameter(scales)
            made.register_hook(partial(_shared, mask=scales != 0, alike=alike))  # type: ignore[no-untyped-call]
        return [x for x in self.scales.values() if isinstance(x, nn.Parameter)]

    def taught(self, parts: Mapping[str, Any]) -> dict[str, Matrix]:
        """The matrices of a tenant with the scales that are here, each as it was given."""
        found = {}
        for key, (at, matrix) in zip(parts, self._spots(parts), strict=True):
            planes, rows, groups = matrix.scales.shape
            scales = self.scales[at.tensor][at.number, 0, :planes, at.start : at.stop].detach()
            scales = scales[:, :: scales.shape[1] // rows, :: scales.shape[2] // groups]
            found[key] = Matrix(matrix.bits, scales.cpu().clone())
        return found

    def _linear(self, name: str, number: int, x: Tensor, rows: Tensor, route: Route, total: int) -> Tensor:
        """One product of one expert for some rows of the input, each with the signs of its tenant."""
        weight, module = getattr(self.module, name, None), self.module
        out: Tensor = module.product(name, number, x) if weight is None else F.linear(x, weight[number])  # type: ignore[operator]
        if name not in self.bits:
            return out
        bits, scales = self.bits[name][number].flatten(0, 1), self.scales[name][number].flatten(0, 1)
        planes = self.bits[name].shape[2]
        slots = route.slots_of(total, route.planes, planes, planes, x.device)[rows]
        return delta_linear(x, out, bits, scales.double() if x.dtype == torch.float64 else scales, slots)

    def _gate(self, both: Tensor) -> Tensor:
        """What is between the two products."""
        own: Any = self.module
        if hasattr(own, "_apply_gate"):
            return own._apply_gate(both)  # type: ignore[no-any-return]
        gate, up = both.chunk(2, dim=-1)
        return own.act_fn(gate) * up  # type: ignore[no-any-return]

    def _spots(self, parts: Mapping[str, Any]) -> list[tuple[Spot, Matrix]]:
        """A tenant's matrices, each with its place."""
        found = []
        for key, matrix in parts.items():
            number, _, part = key.partition(".")
            place = spot(self.module, int(number), part)
            assert place is not None
            found.append((place, matrix))
        return found

    def buffers(self) -> list[Tensor]:
        """As `Hook` says."""
        return [*self.bits.values(), *self.scales.values()]


def _shared(grad: Tensor, mask: Tensor, alike: Mapping[tuple[int, int, torch.Size], list[int]]) -> Tensor:
    """Gradients `[E, 1, P, N, groups]` of scales that are there, summed over those that are one in a matrix."""
    grad = grad * mask
    for (start, stop, (planes, rows, groups)), numbers in alike.items():
        part = grad[numbers, 0, :planes, start:stop]
        cells = part.reshape(len(numbers), planes, rows, part.shape[2] // rows, groups, part.shape[3] // groups)
        grad[numbers, 0, :planes, start:stop] = cells.sum((3, 5), keepdim=True).expand_as(cells).reshape(part.shape)
    return grad


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
