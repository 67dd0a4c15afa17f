"""`layers.project` and `layers.project_gated` in the compiled library."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import Implementation
from . import library

MOST_ROWS, MOST_PARTS = 4, 3

_PARTS = ctypes.c_void_p * MOST_PARTS


class HflProject(ctypes.Structure):
    """`hfl_project`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("rows", "inputs", "dtype", "parts", "gated")),
        ("outputs", ctypes.c_int32 * MOST_PARTS),
        ("x", ctypes.c_void_p),
        ("x_r", ctypes.c_int64),
        *((name, _PARTS) for name in ("weight", "bias", "out")),
        ("stream", ctypes.c_void_p),
    )


def reject(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> str | None:
    """Why the library does not take these arguments, or None."""
    reason = library.reason_on_cuda(x)
    if reason is not None:
        return reason
    given = [x, *weights, *(bias for bias in biases if bias is not None)]
    if x.ndim != 2 or not 1 <= len(x) <= MOST_ROWS or not 1 <= len(weights) <= MOST_PARTS:
        return f"takes 1 to {MOST_ROWS} rows and 1 to {MOST_PARTS} weights"
    if torch.is_grad_enabled() and any(y.requires_grad for y in given):
        return "computes no gradients"
    if x.dtype not in (torch.float16, torch.bfloat16) or any(y.dtype != x.dtype for y in given):
        return "needs rows, weights and biases in one dtype, float16 or bfloat16"
    if any(y.device != x.device for y in given):
        return "needs rows, weights and biases on one device"
    if x.shape[1] % 8 or any(len(weight) % 8 or not len(weight) for weight in weights):
        return "takes multiples of 8 inputs and of 8 outputs"
    if any(weight.shape[1:] != x.shape[1:] for weight in weights):
        return "needs weights with as many inputs as there are channels"
    if not library.aligned(x) or x.stride(1) != 1:
        return "needs rows of channels side by side, which begin at multiples of 16 bytes"
    if not all(y.is_contiguous() and y.data_ptr() % 16 == 0 for y in given[1:]):
        return "needs contiguous weights and biases, which begin at multiples of 16 bytes"
    return None


def reject_gated(x: Tensor, gate: Tensor, up: Tensor) -> str | None:
    """Likewise."""
    return reject(x, (gate, up), ()) or ("needs halves of one shape" if gate.shape != up.shape else None)


def project(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """`layers.project`."""
    out = tuple(x.new_empty(len(x), len(weight)) for weight in weights)
    _run(x, weights, [library.pointer(bias) for bias in biases], out, 0)
    return out


def project_gated(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """`layers.project_gated`."""
    out = x.new_empty(len(x), len(gate))
    _run(x, (gate, up), (), (out,), 1)
    return out


def _run(x: Tensor, weights: Sequence[Tensor], biases: Sequence[int | None], out: Sequence[Tensor], gated: int) -> None:
    block = HflProject(*x.shape, library.DTYPES[x.dtype], len(weights), gated)
    block.outputs = (ctypes.c_int32 * MOST_PARTS)(*(len(weight) for weight in weights))
    block.x, block.x_r = x.data_ptr(), x.stride(0)
    block.weight, block.bias = _PARTS(*(w.data_ptr() for w in weights)), _PARTS(*biases)
    block.out = _PARTS(*(y.data_ptr() for y in out))
    library.run("project", block, x.device)


OPS = {"project": Implementation(project, reject), "project_gated": Implementation(project_gated, reject_gated)}
