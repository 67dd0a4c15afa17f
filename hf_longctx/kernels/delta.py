"""One-bit deltas of weights (BitDelta): each row of a batch meets the delta of its own tenant, which is read as bits.

Paper: arXiv 2402.10193, section 3: `W_finetuned ~ W_base + scale * sign(W_finetuned - W_base)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from . import dispatch
from .reference.delta import gradients

WORD = 32
"""Signs in a word."""

FEW, MANY = 16, 256
"""Rows up to which, and from which on, it may pay to do a layer's product and that of its deltas in one."""


def delta_linear(x: Tensor, base_out: Tensor, bits: Tensor, scales: Tensor, slot_of_row: Tensor) -> Tensor:
    """What a linear layer gives with the deltas of each row's slots: `base_out + sum over slots of x (scale * sign)^T`.

    Deltas of 2 to 4 bits are as many slots, each the sign of what those before it leave: then a row names them all.
    Products are summed up in float32 or better and rounded once, to the dtype of `base_out`. A row's result is the
    same to the last bit whatever the other rows are. Gradients go to x, base_out and scales.

    Args:
        x: `[R, K]`, floating point.
        base_out: `[R, N]`, what the base layer gives for x, its bias included; any floating-point dtype.
        bits: `[S, N, K / 32]`, int32, contiguous; bit b of word w is the sign of input `32 w + b`: 1 is plus.
        scales: `[S, N or 1, groups]`, float32 (float64 if x is); input k has that of group `k // (K / groups)`.
        slot_of_row: `[R]` or `[R, P]`, int32: the slots of each row, -1 for none. In a row of NaN, a CUDA device says
            that it has no such slot; elsewhere that is an error, save that in a compiler's graph -2 is as good as -1.

    Returns:
        `[R, N]`, dtype of base_out.

    Raises:
        ValueError: shapes do not fit, or there is no such slot.
        TypeError: a dtype is another one.
    """
    _check(x, base_out, bits, scales, slot_of_row)
    slots = slot_of_row[:, None] if slot_of_row.ndim == 1 else slot_of_row
    if torch.is_grad_enabled() and (x.requires_grad or base_out.requires_grad or scales.requires_grad):
        out: Tensor = _DeltaLinear.apply(x, base_out, bits, scales, slots)  # type: ignore[no-untyped-call]
        return out
    out = dispatch.call("delta_linear", x, base_out, bits, scales, slots)
    return out


def linear_with_delta(
    x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, scales: Tensor, slot_of_row: Tensor
) -> Tensor:
    """`delta_linear` of a layer with that weight: `x weight^T + bias + sum over slots of x (scale * sign)^T`.

    A backend may do both products of few rows in one, without rounding between them. Where there are many rows, it may
    do with one product in place of two: then `weight + delta` is rounded to the dtype of the weight, as if it had been
    merged.

    Args:
        x: `[R, K]`.
        weight: `[N, K]`, dtype of x.
        bias: `[N]`, or None.
        bits: as in `delta_linear`, like the next two.
        scales: of the slots.
        slot_of_row: slots of the rows.

    Returns:
        `[R, N]`, dtype of x.

    Raises:
        ValueError: as `delta_linear`.
        TypeError: likewise.
    """
    made = joined(x, (weight,), (bias,), (bits,), (scales,), slot_of_row)
    if made is not None:
        return made[0]
    return delta_linear(x, linear(x, weight, bias), bits, scales, slot_of_row)


def joined(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    bits: Sequence[Tensor],
    scales: Sequence[Tensor],
    slot_of_row: Tensor,
) -> tuple[Tensor, ...] | None:
    """`linear_with_delta` of layers that get the same rows, if a backend does it in one; None: none does.

    Args:
        x: `[R, K]`.
        weights: `[N, K]` of each layer; a row's result is the same to the last bit whatever the other layers are.
        biases: `[N]` of each, or None.
        bits: of each, as in `delta_linear`.
        scales: likewise.
        slot_of_row: of all.

    Raises:
        ValueError: as `delta_linear`.
        TypeError: likewise.
    """
    trains = (x, *weights, *scales, *(bias for bias in biases if bias is not None))
    if FEW < len(x) < MANY or not len(x):
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in trains):
        return None
    if torch.compiler.is_compiling():
        return None  # the backend is chosen when the graph runs
    for weight, own_bits, own_scales in zip(weights, bits, scales, strict=True):
        _check(x, x.new_empty(1, 1).expand(len(x), len(weight)), own_bits, own_scales, slot_of_row)
    slots = slot_of_row[:, None] if slot_of_row.ndim == 1 else slot_of_row
    if len(x) <= FEW or len(weights) > 1:
        layers = (x, weights, biases, bits, scales, slots)
        here = _pays("linears_with_delta", layers, (x, weights[0], bits[0], scales[0], slots))
        return dispatch.call("linears_with_delta", *layers) if here else None
    layer = (x, weights[0], biases[0], bits[0], scales[0], slots)
    many = _pays("linear_with_delta", layer, (x, weights[0], bits[0], scales[0], slots))
    return (dispatch.call("linear_with_delta", *layer),) if many else None


def _pays(op: str, arguments: tuple[Any, ...], first: tuple[Tensor, ...]) -> bool:
    """Whether a backend does it that is not slower than the base's product and `delta_linear`; first: of a layer.

    Triton joins what it would compute anyway: where the library takes the deltas, they are left to it.
    """
    backend = dispatch.chosen(op, *arguments)
    if backend != "triton":
        return backend == "compiled"
    x, weight, *others = first
    return dispatch.chosen("delta_linear", x, x.new_empty(1, 1).expand(len(x), len(weight)), *others) == "triton"


class _DeltaLinear(torch.autograd.Function):
    """Whatever backend the result comes from, its gradients are computed with torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base_out: Tensor, bits: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(x, bits, scales, slots)
        ctx.base_dtype = base_out.dtype
        out: Tensor = dispatch.call("delta_linear", x, base_out, bits, scales, slots)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_x, of_base, _, of_scales, _ = ctx.needs_input_grad
        x, bits, scales, slots = ctx.saved_tensors
        x_grad, scales_grad = gradients(grad, x, bits, scales, slots, of_x, of_scales)
        return x_grad, grad.to(ctx.base_dtype) if of_base else None, None, scales_grad, None


def _check(x: Tensor, base_out: Tensor, bits: Tensor, scales: Tensor, slot_of_row: Tensor) -> None:
    """Before anything is computed; what lies on a CUDA device is not looked at, nor is what a compiler traces."""
    for name, tensor in (("bits", bits), ("slot_of_row", slot_of_row)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"delta_linear: expected {name} of torch.int32; got {tensor.dtype}. Convert it.")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not x.is_floating_point() or not base_out.is_floating_point() or scales.dtype != wide:
        got = f"{x.dtype}, {base_out.dtype} and {scales.dtype}"
        raise TypeError(
            f"delta_linear: expected x and base_out in floating point, scales of {wide}; got {got}. Convert."
        )
    if x.ndim != 2 or base_out.ndim != 2 or len(x) != len(base_out):
        got = f"{list(x.shape)} and {list(base_out.shape)}"
        raise _wrong("x [R, K] and base_out [R, N]", got, "Flatten all axes but the last")
    (rows, inputs), outputs = x.shape, base_out.shape[1]
    if bits.ndim != 3 or inputs % WORD or bits.shape[1:] != (outputs, inputs // WORD):
        raise _wrong(f"bits [S, {outputs}, {inputs} / {WORD}]", list(bits.shape), "Pack the signs of this layer")
    places = scales.ndim == 3 and len(scales) == len(bits) and scales.shape[1] in (1, outputs)
    if not places or not scales.shape[2] or inputs % (WORD * scales.shape[2]):
        what = f"scales [{len(bits)}, {outputs} or 1, groups], of a multiple of {WORD} inputs each"
        raise _wrong(what, list(scales.shape), "Give each slot its own")
    if slot_of_row.ndim not in (1, 2) or len(slot_of_row) != rows:
        raise _wrong(f"slot_of_row [{rows}] or [{rows}, P]", list(slot_of_row.shape), "Name the slots of each row")
    if slot_of_row.numel() and not slot_of_row.is_cuda and not torch.compiler.is_compiling():
        least, most = int(slot_of_row.min()), int(slot_of_row.max())
        if least < -1 or most >= len(bits):
            raise _wrong(f"slots from -1 to {len(bits) - 1}", f"{least} to {most}", "Name slots that there are")


def _wrong(what: str, got: object, do: str) -> ValueError:
    return ValueError(f"delta_linear: expected {what}; got {got}. {do}.")
