"""Quantized keys and values: one scale and one zero for the channels of a token and head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..types import Packed

LEAST_SCALE = 2.0**-14
"""The smallest normal number of float16."""

LARGEST_ZERO = 2048
"""Up to here float16 holds every whole number."""


def encode_kv(x: Tensor, bits: int) -> Packed:
    """The definition of `ops.encode_kv`."""
    work = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    least, largest = work.aminmax(dim=-1, keepdim=True)
    steps = 2**bits - 1
    floor = torch.maximum(least.abs(), largest.abs()) / LARGEST_ZERO
    scale = torch.maximum((largest - least) / steps, floor).clamp(min=LEAST_SCALE).to(torch.float16)
    zero = (-least / scale.to(work.dtype)).to(torch.float16)
    payload = (work / scale.to(work.dtype) + zero.to(work.dtype)).round_().clamp_(0, steps).to(torch.uint8)
    if bits == 4:
        payload = payload[..., 0::2] | payload[..., 1::2] << 4
    return Packed(payload, scale.squeeze(-1), zero.squeeze(-1), bits, x.dtype)


def decode_kv(x: Packed) -> Tensor:
    """The definition of `ops.decode_kv`; the axes before the last may be any."""
    payload = x.payload
    if x.bits == 4:
        payload = torch.stack((payload & 15, payload >> 4), -1).flatten(-2)
    return ((payload.float() - x.zero.float()[..., None]) * x.scale.float()[..., None]).to(x.dtype)


def read(x: Tensor | Packed, index: tuple[Any, ...]) -> Tensor:
    """Values at an index of rows, heads and columns; of packed ones only those are decoded."""
    if isinstance(x, Tensor):
        return x[index]
    return decode_kv(replace(x, payload=x.payload[index], scale=x.scale[index], zero=x.zero[index]))


def first_columns(x: Tensor | Packed, columns: int) -> Tensor | Packed:
    """So many of a store, sharing its memory."""
    if isinstance(x, Tensor):
        return x[:, :, :columns]
    payload, scale, zero = (part[:, :, :columns] for part in (x.payload, x.scale, x.zero))
    return replace(x, payload=payload, scale=scale, zero=zero)
