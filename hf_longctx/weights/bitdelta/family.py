"""Linear layers that get the same tensor: their products, and those with the signs of all tenants, are one call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...kernels.delta import FEW, joined

if TYPE_CHECKING:
    from .route import Route
    from .signs import Signs

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
        first = hook is self.members[0] and input.shape[:-1].numel() <= FEW
        members = [x for x in self.members if x.bits is not None and x.part is None] if first else [hook]
        made = _joined(members, input, route)
        if made is None and len(members) > 1:
            members = [hook]
            made = _joined(members, input, route)
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


def _joined(members: list[Signs], input: Tensor, route: Route) -> list[Tensor] | None:
    flat, layers = input.reshape(-1, input.shape[-1]), [x.module._parameters for x in members]
    arguments = [x.arguments(route, flat) for x in members]
    slots = arguments[0][2]
    if any(own[2] is not slots for own in arguments):
        return None  # other numbers of planes
    weights: Any = [own["weight"] for own in layers]
    biases = [own.get("bias") for own in layers]
    made = joined(flat, weights, biases, [own[0] for own in arguments], [own[1] for own in arguments], slots)
    return None if made is None else [x.reshape(*input.shape[:-1], -1) for x in made]
