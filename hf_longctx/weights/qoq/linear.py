"""A linear layer of 4- or 8-bit weights, whose inputs are rounded to 8 bits token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.linear import (
    COLUMNS,
    ROWS,
    PackedWeight,
    Tokens,
    is_one_launch,
    quantize_tokens,
    w4a8_linear,
    w4a8_linears,
    w4a8_linears_of,
)
from ...kernels.packing import pack, unpack
from .config import QoQConfig
from .grids import Grid

_TOKENS = "_qoq_tokens"
"""Where an input carries its own 8-bit form: q, k and v read the same one."""
TOGETHER = 16
"""Tokens up to which layers that read the same input are one launch."""
MOST = 3
"""Layers of one launch."""
DEVICES = {"cuda"}
"""Types of devices on which they are: there a launch takes longer than what a small layer computes."""


@dataclass(frozen=True)
class _Kept:
    """The 8-bit form of a tensor as it was: at a version, made in a CUDA graph or not, and which layers have read it.

    A layer that comes a second time begins another pass over a tensor that stays, whose content a graph may replace.
    Results of layers that have read it in the launch of another one wait here until those layers are called. The form
    is made when it is needed: not for layers whose launch makes it itself.
    """

    version: int
    captured: bool
    held: list[Tokens] = field(default_factory=list)
    readers: list[QoQLinear] = field(default_factory=list)
    made: dict[int, Tensor] = field(default_factory=dict)

    def tokens(self, x: Tensor) -> Tokens:
        """The 8-bit form; x is the tensor."""
        if not self.held:
            self.held.append(quantize_tokens(x.reshape(-1, x.shape[-1])))
        return self.held[0]


class QoQLinear(nn.Module):
    """`y = x W^T + b` in integers: int8 tokens, 4- or 8-bit weights, one scale for each of both.

    Paper: QServe (arXiv:2405.04532) §4.1, §5.2.

    The gradient of the input is that of the dequantized weight, as if inputs were not rounded (straight through); the
    weight has none.

    Attributes:
        weight: `[panels, bytes]` uint8, a row for each 64 output channels, in the order of `kernels.packing`. No shape
            that a dense weight could have: read without this package, a checkpoint is refused.
        weight_scale: `[N]` float32.
        weight_shift: `[N]` float32: one level of 4 bits; None otherwise.
        weight_groups: `[panels, K' / group, 64, 2]` uint8: two levels; None otherwise.
        bias: `[N]` or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        config: QoQConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.width = in_features  # input channels that are here: fewer where processes share a layer
        self.wbits, self.group_size = config.wbits, config.group_size
        parts = blank(out_features, in_features, config, device)
        self.weight, self.weight_scale, self.weight_shift, self.weight_groups = parts
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self._next: tuple[QoQLinear, ...] = ()  # layers that were seen to read the same input after this one

    @classmethod
    def of(cls, linear: nn.Linear, grid: Grid, codes: Tensor, config: QoQConfig) -> QoQLinear:
        """A linear layer whose weight is on a grid; its bias stays.

        Args:
            linear: that is replaced.
            grid: of its weight.
            codes: `[N, K]`.
            config: bits and groups of the grid.
        """
        made = cls(linear.in_features, linear.out_features, False, config, "meta")
        for name, tensor in packed_tensors(grid, codes).items():
            setattr(made, name, fixed(tensor))
        made.bias = linear.bias
        return made

    @property
    def packed(self) -> PackedWeight:
        """The weight as kernels take it; no copy."""
        codes = self.weight.view(len(self.weight) * ROWS, -1)
        return PackedWeight(codes, self.weight_scale, self.weight_shift, self.weight_groups, self.width)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the weight stands for: `[N, K]`."""
        return dequantized(self.packed, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., K]` to `[..., N]`, dtype of x."""
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            out: Tensor = _StraightThrough.apply(x, self)  # type: ignore[no-untyped-call]
            return out if self.bias is None else out + self.bias.to(out.dtype)
        if torch.compiler.is_compiling() or x.is_inference():  # no version tells whether x was written to
            return self._shaped(self.of_tokens(quantize_tokens(x.reshape(-1, x.shape[-1])), x.dtype), x)
        return self._shaped(self._with_others(x, _kept(x, self)), x)

    def extra_repr(self) -> str:
        """Sizes and bits."""
        of = f"{self.wbits} bits" + (f", groups of {self.group_size}" if self.weight_groups is not None else "")
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {of}"

    def of_tokens(self, tokens: Tokens, dtype: torch.dtype) -> Tensor:
        """`[M, N]` of a dtype, for inputs that are 8 bits already; without a gradient."""
        return w4a8_linear(tokens, self.packed, None if self.bias is None else self.bias.float(), dtype)

    def of_gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """`[M, N]` of SiLU of a gate `[M, K]` times `up`; without a gradient, in one launch (`is_one_launch`)."""
        return w4a8_linears_of(gate, up, [self.packed], [None if self.bias is None else self.bias.float()])[0]

    def _with_others(self, x: Tensor, kept: _Kept) -> Tensor:
        """The product, and those of layers that will read x, too, while that is one launch; or one that waits."""
        made = kept.made.pop(id(self), None)
        if made is not None:
            return made
        rows, first = x.reshape(-1, x.shape[-1]), kept.readers[0]
        if len(rows) > TOGETHER or x.device.type not in DEVICES:
            return self.of_tokens(kept.tokens(x), x.dtype)
        if first is not self:
            if self not in first._next and len(first._next) < MOST - 1 and self._is_like(first):
                first._next = (*first._next, self)
            return self.of_tokens(kept.tokens(x), x.dtype)
        layers = [self, *(layer for layer in self._next if self._is_like(layer))]
        biases = [None if layer.bias is None else layer.bias.float() for layer in layers]
        packed = [layer.packed for layer in layers]
        if not kept.held and is_one_launch(rows):
            out, *others = w4a8_linears_of(rows, None, packed, biases)
        else:
            out, *others = w4a8_linears(kept.tokens(x), packed, biases, x.dtype)
        kept.made.update({id(layer): y for layer, y in zip(layers[1:], others, strict=True)})
        return out

    def _is_like(self, other: QoQLinear) -> bool:
        form = (self.width, self.wbits, self.group_size, self.weight.device)
        return form == (other.width, other.wbits, other.group_size, other.weight.device)

    def _shaped(self, out: Tensor, x: Tensor) -> Tensor:
        return out.view(*x.shape[:-1], len(self.weight_scale))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QoQLinear:
        """Move to a device; scales stay float32 whatever dtype the model is brought to."""
        with keep_float32(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def blank(
    rows: int, columns: int, config: QoQConfig, device: Any, each: tuple[int, ...] = ()
) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter | None, nn.Parameter | None]:
    """Room for a stored weight `[rows, columns]`, or for one of each of `each`; in the order of `config.PARTS`."""
    panels, stored = -(-rows // ROWS), -(-columns // COLUMNS) * COLUMNS

    def made(*shape: int, dtype: torch.dtype = torch.uint8) -> nn.Parameter:
        return fixed(torch.empty(*each, *shape, dtype=dtype, device=device))

    weight, scale = made(panels, ROWS * stored * config.wbits // 8), made(rows, dtype=torch.float32)
    shift = made(rows, dtype=torch.float32) if config.kind == "channel" else None
    groups = made(panels, stored // config.group_size, ROWS, 2) if config.kind == "group" else None
    return weight, scale, shift, groups


@contextmanager
def keep_float32(module: nn.Module) -> Iterator[None]:
    """Scales of a quantized module stay float32 while all of it is brought to another dtype or device."""
    scales = {name: x for name in ("weight_scale", "weight_shift") if (x := getattr(module, name)) is not None}
    before = {name: x.data for name, x in scales.items()}
    yield
    for name, old in before.items():
        now = getattr(module, name)
        if now.dtype != torch.float32:
            setattr(module, name, fixed(old.to(now.device)))


class _StraightThrough(torch.autograd.Function):
    """The quantized product forward, the dequantized weight backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: QoQLinear) -> Tensor:
        ctx.linear = linear
        tokens = quantize_tokens(x.reshape(-1, x.shape[-1])) if x.is_inference() else _kept(x, linear).tokens(x)
        return linear._shaped(w4a8_linear(tokens, linear.packed, None, x.dtype), x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.linear.dequantized(grads[0].dtype), None


def dequantized(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """What a stored weight stands for: `[N, K]`."""
    codes = unpack(packed)
    values = codes.values.float()
    if codes.group_scale is not None and codes.group_zero is not None:
        values = values.view(*codes.group_scale.shape, -1)
        values = (values * codes.group_scale[..., None] + codes.group_zero[..., None]).flatten(1)
    values = values * codes.scale[:, None]
    return (values if codes.shift is None else values - codes.shift[:, None]).to(dtype)


def packed_tensors(grid: Grid, codes: Tensor) -> dict[str, Tensor]:
    """Tensors of a `QoQLinear` by name, for codes `[N, K]` of a grid."""
    return parts_of(pack(grid.form(codes)))


def parts_of(packed: PackedWeight) -> dict[str, Tensor]:
    """A stored weight as the tensors of a `QoQLinear`, by name."""
    found = {
        "weight": packed.codes.view(len(packed.codes) // ROWS, -1),
        "weight_scale": packed.scale,
        "weight_shift": packed.shift,
        "weight_groups": packed.groups,
    }
    return {name: x for name, x in found.items() if x is not None}


def _kept(x: Tensor, reader: QoQLinear) -> _Kept:
    """The 8-bit form of an input, kept with it for the next layer that reads the same one."""
    kept: _Kept | None = getattr(x, _TOKENS, None)
    known = kept is not None and (kept.version, kept.captured) == (x._version, _captured(x))
    if kept is None or not known or any(layer is reader for layer in kept.readers):
        kept = keep_tokens(x)
    kept.readers.append(reader)
    return kept


def keep_tokens(x: Tensor, *tokens: Tokens) -> _Kept:
    """Keep the 8-bit form of a tensor with it, if it was made, for layers that read it as it is now."""
    kept = _Kept(x._version, _captured(x), list(tokens))
    setattr(x, _TOKENS, kept)
    return kept


def _captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def fixed(tensor: Tensor) -> nn.Parameter:
    """A parameter that no training changes."""
    return nn.Parameter(tensor, requires_grad=False)
