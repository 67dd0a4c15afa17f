"""Experts of a layer as linear layers, each for itself, while they are calibrated; and together again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..chosen import is_known
from ..config import PARTS, QoQConfig
from ..experts import DOWN, UP, QoQExperts, put, stacked
from ..linear import QoQLinear


class Expert(nn.Module):
    """The linear layers of one expert, whose weights are parts of those of all."""

    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        for name, weight in ((UP, up), (DOWN, down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            setattr(self, name, linear)


class Experts(nn.ModuleList):
    """In the place of a module of fused experts; computes the same.

    Args:
        old: as `chosen.is_known` has it.
    """

    def __init__(self, old: Any) -> None:
        super().__init__(Expert(*pair) for pair in zip(old.gate_up_proj.data, old.down_proj.data, strict=True))
        self.was = (old,)  # no module of this one

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What tokens `[T, H]` get of their experts `[T, k]`; of those that have tokens alone."""
        out, act = torch.zeros_like(hidden), self.was[0].act_fn
        each: Any = self
        for number, expert in enumerate(each):
            token, place = torch.where(top_k_index == number)
            if len(token):
                gate, up = expert.gate_up(hidden[token]).chunk(2, -1)
                mine = expert.down(act(gate) * up) * top_k_weights[token, place, None]
                out.index_add_(0, token, mine.to(out.dtype))
        return out


def take_apart(layer: nn.Module) -> None:
    """Have the experts of a decoder layer be linear layers; no copy."""
    for name, module in list(layer.named_modules()):
        if is_known(module):
            layer.set_submodule(name, Experts(module))


def put_back(layer: nn.Module) -> None:
    """Undo `take_apart`, while nothing was changed."""
    for name, module in list(layer.named_modules()):
        if isinstance(module, Experts):
            layer.set_submodule(name, module.was[0])


def put_together(layer: nn.Module, config: QoQConfig) -> None:
    """Have experts whose linear layers are quantized be one module."""
    for name, module in list(layer.named_modules()):
        if isinstance(module, Experts):
            made = QoQExperts(module.was[0], config)
            for part in (UP, DOWN):
                put(getattr(made, part), stacked([_tensors(getattr(expert, part)) for expert in module]))
            layer.set_submodule(name, made)


def _tensors(linear: QoQLinear) -> dict[str, Tensor]:
    return {name: x.data for name in PARTS if (x := getattr(linear, name)) is not None}
