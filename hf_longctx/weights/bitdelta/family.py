"""Linear layers that get the same tensor: their products, and those with the signs of all tenants, are one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels.delta import FEW, MANY, delta_linear, joined

if TYPE_CHECKING:
    from .route import Route
    from .signs import Kind, Signs

_NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Of layers beside each other, in the order in which models call them."""


@dataclass(eq=False)
class Family:
    """Hooks on layers that get the same tensor, and what is done of them.

    Attributes:
        members: in the order in which they are called.
        given: the tensor that the first one got.
        route: tenants of its rows.
        waiting: outputs that were not fetched yet.
    """

    members: list[Signs]
    given: Tensor | None = None
    route: Route | None = None
    waiting: dict[Signs, Tensor] = field(default_factory=dict)

    def take(self, hook: Signs, input: Tensor, route: Route) -> Tensor | None:
        """The output of one layer, with its signs; None: no backend joins these products.

        Args:
            hook: of the layer.
            input: `[..., K]`.
            route: tenants of the rows.
        """
        if self.given is input and self.route is route and hook in self.waiting:
            out = self.waiting.pop(hook)
            if not self.waiting:
                self.given = None
            return out
        self.given, self.route, self.waiting = None, route, {}
        rows = input.shape[:-1].numel()
        first = hook is self.members[0] and not FEW < rows < MANY
        members = [x for x in self.members if x.bits is not None and x.part is None] if first else [hook]
        made = _outputs(members, input, route)
        if made is None and len(members) > 1:
            members = [hook]
            made = _outputs(members, input, route)
        if made is None:
            return None
        if len(made) > 1:
            self.given, self.waiting = input, dict(zip(members[1:], made[1:], strict=True))
        return made[0]


def families(hooks: Mapping[str, Any], key: str, kind: type[Signs]) -> None:
    """Bring together the hooks beside one layer.

    Args:
        hooks: all, by the names of their layers.
        key: the name of the layer.
        kind: of hooks that can be together.
    """
    parent, _, name = key.rpartition(".")
    for names in _NAMES:
        if name in names:
            found = [hooks.get(f"{parent}.{other}") for other in names]
            members = [x for x in found if isinstance(x, kind)]
            family = Family(members)
            for x in members:
                x.family = family


def _outputs(members: list[Signs], input: Tensor, route: Route) -> list[Tensor] | None:
    """What layers give, or None: no backend joins the products of any kind of rows, or kinds are not the same."""
    kinds = members[0].kinds(route)
    if any(x.kinds(route) != kinds for x in members):
        return None
    flat = input.reshape(-1, input.shape[-1])
    each = [_joined(members, flat, route, kind) for kind in kinds]
    if all(made is None for made in each) or (len(members) > 1 and None in each):
        return None
    out: list[Tensor] = []
    for kind, made in zip(kinds, each, strict=True):
        if made is None:
            base = members[0].base(input)
            base = base.reshape(len(flat), base.shape[-1])
            made = (delta_linear(flat, base, *members[0].arguments(route, flat, kind)),)
        if out:
            mine = route.those(len(flat), tuple(own > 0 for own in kind.own), flat.device)[:, None]
            made = tuple(torch.where(mine, new, old) for new, old in zip(made, out, strict=True))
        out = list(made)
    return [x.reshape(*input.shape[:-1], -1) for x in out]


def _joined(members: list[Signs], flat: Tensor, route: Route, kind: Kind) -> tuple[Tensor, ...] | None:
    """What layers give rows of a kind; the others' are of no use."""
    layers = [x.module._parameters for x in members]
    bits, scales, slots = zip(*(x.arguments(route, flat, kind) for x in members), strict=True)
    if any(own is not slots[0] for own in slots):
        return None  # other numbers of planes
    weights: Any = [own["weight"] for own in layers]
    return joined(flat, weights, [own.get("bias") for own in layers], bits, scales, slots[0])
