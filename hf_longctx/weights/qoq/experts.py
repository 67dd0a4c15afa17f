"""The experts of a mixture in one module: matrices of 4- or 8-bit weights, tokens of 8 bits sorted by expert."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ...kernels.experts import PackedExperts, Sorted, combine_experts, sort_experts, w4a8_experts
from ...kernels.linear import ROWS, Tokens, quantize_gated, quantize_tokens, w4a8_linear
from .chosen import EXPERTS
from .config import QoQConfig
from .grids import nearest_grid
from .linear import blank, dequantized, fixed, keep_float32, packed_tensors

UP, DOWN = "gate_up", "down"
"""Names of the two in a `QoQExperts`."""
FUSED = dict(zip(EXPERTS, (UP, DOWN), strict=True))
"""The same by transformers' names of what they replace."""


class QoQMatrices(nn.Module):
    """One matrix for each expert, without a bias.

    Attributes:
        weight: `[E, panels, bytes]` uint8: for each expert what `QoQLinear.weight` is; so are the others.
        weight_scale: `[E, N]` float32.
        weight_shift: `[E, N]` float32: one level of 4 bits; None otherwise.
        weight_groups: `[E, panels, K' / group, 64, 2]` uint8: two levels; None otherwise.
    """

    def __init__(
        self, experts: int, in_features: int, out_features: int, config: QoQConfig, device: Any = "meta"
    ) -> None:
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        self.wbits, self.group_size = config.wbits, config.group_size
        parts = blank(out_features, in_features, config, device, (experts,))
        self.weight, self.weight_scale, self.weight_shift, self.weight_groups = parts

    @property
    def packed(self) -> PackedExperts:
        """The weights as kernels take them; no copy."""
        experts, panels, _ = self.weight.shape
        codes = self.weight.view(experts, panels * ROWS, -1)
        return PackedExperts(codes, self.weight_scale, self.weight_shift, self.weight_groups, self.in_features)

    def dequantized(self, expert: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the weight of an expert stands for: `[N, K]`."""
        return dequantized(self.packed.of(expert), dtype)

    def forward(self, tokens: Tokens, by: Sorted, times: int, dtype: torch.dtype) -> Tensor:
        """`kernels.experts.w4a8_experts` with these."""
        return w4a8_experts(tokens, self.packed, by, times, dtype)

    def extra_repr(self) -> str:
        """Sizes and bits."""
        sizes = f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}"
        of = f", groups of {self.group_size}" if self.weight_groups is not None else ""
        return f"{sizes}, {self.wbits} bits{of}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QoQMatrices:
        """Move to a device; scales stay float32 whatever dtype the model is brought to."""
        with keep_float32(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class QoQExperts(nn.Module):
    """In the place of transformers' module of experts: `sum_e p_e down_e(act(gate_e x) * up_e x)`.

    Paper: QServe (arXiv:2405.04532) §4.1, §5.2, for each expert.

    The gradient of the input is that of the dequantized weights, as if inputs were not rounded (straight through).

    Attributes:
        gate_up: `QoQMatrices` of H to 2I channels; gates first.
        down: of I to H.
    """

    def __init__(self, old: Any, config: QoQConfig) -> None:
        super().__init__()
        experts, inner, width = old.gate_up_proj.shape
        self.num_experts = experts
        self.gate_up = QoQMatrices(experts, width, inner, config)
        self.down = QoQMatrices(experts, inner // 2, width, config)
        self.act_fn = old.act_fn
        self._was = type(old), old.config

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What tokens get of their experts.

        Args:
            hidden_states: `[T, H]`.
            top_k_index: `[T, k]`, int64; a number that no expert has adds nothing.
            top_k_weights: `[T, k]`.

        Returns:
            `[T, H]`, dtype of the input.
        """
        x, (_, top) = hidden_states.reshape(-1, hidden_states.shape[-1]), top_k_index.shape
        by = sort_experts(top_k_index.reshape(-1).long(), self.num_experts)
        if torch.is_grad_enabled() and (x.requires_grad or top_k_weights.requires_grad):
            return self._with_gradient(x, by, top_k_weights).view(hidden_states.shape)
        gate, up = self.gate_up(quantize_tokens(x), by, top, x.dtype).chunk(2, 1)
        inner = quantize_gated(gate, up) if self._is_silu else quantize_tokens(self.act_fn(gate) * up)
        rows = self.down(inner, by, 0, x.dtype)
        return combine_experts(rows, by, top_k_weights.contiguous()).view(hidden_states.shape)

    @property
    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """`(E, N, K)` of what the tensors of transformers' module stood for."""
        each = {name: getattr(self, own) for name, own in FUSED.items()}
        return {name: (self.num_experts, x.out_features, x.in_features) for name, x in each.items()}

    def product(self, tensor: str, expert: int, x: Tensor) -> Tensor:
        """`[T, K]` times the weight of one expert, `[T, N]`; `tensor` as in `sizes`."""
        matrices: QoQMatrices = getattr(self, FUSED[tensor])
        return w4a8_linear(quantize_tokens(x), matrices.packed.of(expert), None, x.dtype)

    def products(self, tensor: str, x: Tensor, by: Sorted) -> Tensor:
        """`product` of rows `[S, K]` in the order of experts, each with its own."""
        matrices: QoQMatrices = getattr(self, FUSED[tensor])
        out: Tensor = matrices(quantize_tokens(x), by, 0, x.dtype)
        return out

    @property
    def _is_silu(self) -> bool:
        return isinstance(self.act_fn, nn.SiLU) or type(self.act_fn).__name__ == "SiLUActivation" or self.act_fn is silu

    def _with_gradient(self, x: Tensor, by: Sorted, weights: Tensor) -> Tensor:
        """The same in operations that can be gone back through."""
        tokens, top = weights.shape
        there = (by.places < by.ends[-1]).view(tokens, top, 1)
        gate, up = _product(x[by.order.long() // top], self.gate_up, by).chunk(2, 1)
        rows = _product(self.act_fn(gate) * up, self.down, by)
        parts = rows[by.places.long()].view(tokens, top, -1).float() * weights.float()[..., None]
        return parts.where(there, 0.0).sum(1).to(x.dtype)

    def plain(self, dtype: torch.dtype) -> nn.Module:
        """Transformers' module of the dequantized weights."""
        kind, config = self._was
        with torch.device("meta"):
            made: nn.Module = kind(config)
        for name, own in FUSED.items():
            matrices: QoQMatrices = getattr(self, own)
            each = [matrices.dequantized(expert, dtype) for expert in range(self.num_experts)]
            setattr(made, name, nn.Parameter(torch.stack(each)))
        return made.train(self.training)


class _StraightThrough(torch.autograd.Function):
    """The quantized product forward, the dequantized weights backward; rows in the order of experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrices: QoQMatrices, by: Sorted) -> Tensor:
        ctx.matrices, ctx.by = matrices, by
        out: Tensor = matrices(quantize_tokens(x), by, 0, x.dtype)
        out[int(by.ends[-1]) :] = 0
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        back = grad.new_zeros(len(grad), ctx.matrices.in_features)
        first = 0
        for expert, end in enumerate(ctx.by.ends.tolist()):
            if end > first:
                back[first:end] = grad[first:end] @ ctx.matrices.dequantized(expert, grad.dtype)
            first = end
        return back, None, None


def _product(x: Tensor, matrices: QoQMatrices, by: Sorted) -> Tensor:
    out: Tensor = _StraightThrough.apply(x, matrices, by)  # type: ignore[no-untyped-call]
    return out


def stacked(each: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of a `QoQMatrices` by name, of those of a `QoQLinear` for each expert."""
    return {name: torch.stack([tensors[name] for tensors in each]) for name in each[0]}


def rounded(weights: Tensor, config: QoQConfig) -> dict[str, Tensor]:
    """Tensors of a `QoQMatrices` by name, for weights `[E, N, K]` rounded to the nearest."""
    each = []
    for weight in weights:
        grid = nearest_grid(weight, config)
        each.append(packed_tensors(grid, grid.codes(weight)))
    return stacked(each)


def put(module: QoQMatrices, tensors: dict[str, Tensor]) -> None:
    """Have a `QoQMatrices` hold these."""
    for name, x in tensors.items():
        setattr(module, name, fixed(x))
