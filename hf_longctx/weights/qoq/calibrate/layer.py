"""One decoder layer: made easy, measured, rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import UnsupportedError
from ..grids import Grid, nearest_grid
from ..linear import QoQLinear
from .blocks import Block
from .flow import Call, Inputs, Seen, watching
from .hadamard import hadamard
from .recipe import Recipe
from .rounding import fit, gptq, output_error
from .transforms import (
    Change,
    gain,
    reorder_down,
    rotate_block,
    rotate_values,
    smooth_attention,
    smooth_down,
    smooth_values,
    turn_heads,
)

_EQUAL = 2e-3
"""Largest relative difference of a layer's output that a change which should not matter may make, in float32."""


_ALIKE = 128
"""Tokens that an expert's own must outnumber: a few say how large its inputs are, little of how they go together."""


@dataclass(frozen=True)
class LinearReport:
    """Relative error of a linear layer's outputs on the texts: root of the mean squared change over the mean square.

    Attributes:
        name: of the linear layer.
        nearest: its original weights to the nearest code.
        eased: rotated, smoothed and sorted weights likewise.
        clipped: with a searched reach.
        kept: as they are now.
    """

    name: str
    nearest: float
    eased: float
    clipped: float
    kept: float


@dataclass(frozen=True)
class LayerReport:
    """Errors of a layer: of its linear layers, and `output`, that of what it adds to the residual stream.

    Attributes:
        layer: its name.
        output: error.
        linears: one each.
        unreached: experts to which no token of the texts came: their weights are rounded to the nearest, and errors
            are those of inputs that are alike.
    """

    layer: str
    output: float
    linears: tuple[LinearReport, ...]
    unreached: tuple[str, ...] = ()

    @property
    def about(self) -> dict[str, Any]:
        """For a JSON file."""
        about = {"layer": self.layer, "output": self.output, "linears": [asdict(each) for each in self.linears]}
        return {**about, "unreached": list(self.unreached)} if self.unreached else about


@torch.no_grad()
def quantize_layer(
    block: Block, call: Call, inputs: Inputs, recipe: Recipe, turn: Tensor | None, rotary: int
) -> LayerReport:
    """Change and round the weights of a layer, in place: its linear layers become `QoQLinear`.

    Args:
        block: in float32, on the device to work on.
        call: what it is called with.
        inputs: of the layer; rotated, if it is to be.
        recipe: the steps.
        turn: `[H, H]`, the rotation of the residual stream, or None.
        rotary: channels of a head that are rotated by position.

    Raises:
        UnsupportedError: the layer computes something else after a change that should not matter.
        RuntimeError: inputs that are not finite.
    """
    device = block.o.weight.device
    sample = inputs[0].to(device)
    places = _places(block)
    plain = {name: linear.weight.clone() for name, (linear, _) in places.items()}
    expected = call(block.layer, sample) if turn is None else call(block.layer, sample @ turn.T) @ turn
    carry = _rotate(block, turn)
    with watching(block, rotary) as (seen, keys):
        for batch in inputs:
            call(block.layer, batch.to(device))
    _check_finite(block, seen)
    changes = _ease(block, seen, keys.size, recipe)
    _check_equal(block, call(block.layer, sample), expected)
    reports = []
    for name, (linear, place) in places.items():
        reached = seen[place].tokens > 0
        moments = _of_expert(seen[place]) if block.routers and "." in place else seen[place].moments
        nearest = _nearest(plain.pop(name), carry.get(place.rpartition(".")[2]), moments, recipe)
        if place in changes:
            moments = changes[place].moments(moments)
        steps = recipe if reached else replace(recipe, clip=False, gptq=False)
        reports.append(_quantize_linear(block.layer, name, linear, moments, steps, nearest))
    added = (expected - sample).square().mean().clamp(min=1e-30)
    error = (call(block.layer, sample) - expected).square().mean() / added
    unreached = tuple(each.name for each in block.mlps if not seen[each.place("mlp")].tokens)
    return LayerReport(block.name, float(error.sqrt()), tuple(reports), unreached)


def _places(block: Block) -> dict[str, tuple[nn.Linear, str]]:
    """The linear layers of a block by name, and what they read, as `watching` names it."""
    reads: dict[nn.Module, str] = {block.o: "o", **dict.fromkeys(block.readers[0][1], "attention")}
    for mlp in block.mlps:
        reads |= {mlp.gate.linear: mlp.place("mlp"), mlp.up.linear: mlp.place("mlp"), mlp.down: mlp.place("down")}
    linears = {name: x for name, x in block.layer.named_modules() if isinstance(x, nn.Linear)}
    found = {name: x for name, x in linears.items() if x not in block.routers}
    other = [name for name, x in found.items() if x not in reads]
    if other:
        raise UnsupportedError(
            f"quantize: expected linear layers of attention and a gated MLP in {block.name}; got also {other[0]}. "
            "Load it with QoQConfig instead, which rounds weights to the nearest."
        )
    return {name: (x, reads[x]) for name, x in found.items()}


def _of_expert(seen: Seen) -> Tensor:
    """Moments of the inputs of an expert: the fewer tokens it got, the more as if inputs had nothing in common."""
    if not seen.tokens:
        return torch.eye(len(seen.size), device=seen.size.device)
    moments = seen.moments * (seen.tokens / (seen.tokens + _ALIKE))
    moments.diagonal().copy_(seen.moments.diagonal())
    return moments


def _rotate(block: Block, turn: Tensor | None) -> dict[str, Callable[[Tensor], Tensor]]:
    """Rotate the residual stream and values; gives, by place, how a weight `[N, K]` is written for the new inputs."""
    if turn is None:
        return {}
    gains = [gain(norm, len(turn)) for norm, _ in block.readers]
    rotate_block(block, turn)
    rotate_values(block)
    head = hadamard(block.head_dim).to(turn)
    return {
        "attention": lambda weight: (weight * gains[0]) @ turn,
        "mlp": lambda weight: (weight * gains[1]) @ turn,
        "o": lambda weight: turn_heads(weight, head),
    }


def _ease(block: Block, seen: dict[str, Seen], keys: Tensor, recipe: Recipe) -> dict[str, Change]:
    """Smooth and sort; gives, by place, what became of input channels."""
    if recipe.smooth_attention:
        smooth_attention(block, keys, recipe.smooth_attention)
    changes, alpha = {}, recipe.smooth_inputs
    if alpha is not None and not recipe.rotate:
        spread = smooth_values(block, seen["o"].size, alpha, 1 - alpha)
        changes["o"] = Change(spread, torch.arange(len(spread), device=spread.device))
    for mlp in block.mlps:
        size = seen[mlp.place("down")].size
        divisor, order = torch.ones_like(size), torch.arange(len(size), device=size.device)
        if not seen[mlp.place("down")].tokens:
            continue
        if alpha is not None:
            divisor = smooth_down(mlp, size, alpha, 1 - alpha)
        if recipe.reorders:
            order = reorder_down(mlp, size / divisor)
        changes[mlp.place("down")] = Change(divisor[order], order)
    return changes


def _quantize_linear(
    layer: nn.Module, name: str, linear: nn.Linear, moments: Tensor, recipe: Recipe, nearest: float
) -> LinearReport:
    """Put one linear layer on its grid, and measure it before and after."""
    weight = linear.weight.float()
    whole = output_error(weight, moments).sum().clamp(min=1e-30)

    def error(grid: Grid, codes: Tensor) -> float:
        return float((output_error(grid.values(codes) - weight, moments).sum() / whole).sqrt())

    grid = nearest_grid(weight, recipe.config)
    eased = clipped = error(grid, codes := grid.codes(weight))
    if recipe.clip:
        grid = fit(weight, recipe.config, moments)
        clipped = error(grid, codes := grid.codes(weight))
    if recipe.gptq:
        codes = gptq(weight, grid, moments)
    layer.set_submodule(name, QoQLinear.of(linear, grid, codes, recipe.config))
    return LinearReport(name, nearest, eased, clipped, error(grid, codes))


def _nearest(weight: Tensor, carry: Callable[[Tensor], Tensor] | None, moments: Tensor, recipe: Recipe) -> float:
    """Relative error of the original weights to the nearest code."""
    grid = nearest_grid(weight, recipe.config)
    change = grid.values(grid.codes(weight)) - weight
    if carry is not None:
        weight, change = carry(weight), carry(change)
    whole = output_error(weight, moments).sum().clamp(min=1e-30)
    return float((output_error(change, moments).sum() / whole).sqrt())


def _check_finite(block: Block, seen: dict[str, Seen]) -> None:
    for place, each in seen.items():
        if not bool(each.size.isfinite().all()):
            raise RuntimeError(
                f"quantize: expected finite inputs of '{place}' in {block.name}; got {float(each.size.max())}. "
                "Check the model in float32 or bfloat16; what is quantized so far stays."
            )


def _check_equal(block: Block, got: Tensor, expected: Tensor) -> None:
    """Nothing above may change what a layer computes; a family that is built otherwise shows here."""
    change, scale = (x.square().mean(-1).flatten() for x in (got - expected, expected))
    if block.routers:  # of two experts that are as likely, rounding may choose the other for a token
        change = change.sort().values[: len(change) - len(change) // 100 - 1]
    apart = float((change.mean() / scale.mean().clamp(min=1e-40)).sqrt())
    if not apart <= _EQUAL:
        raise UnsupportedError(
            f"quantize: expected {block.name} to compute the same when rotated and smoothed; got a relative difference "
            f"of {apart:.1e}. Pass --no-rotate --smooth-attention 0 --no-smooth, or load it with QoQConfig."
        )
