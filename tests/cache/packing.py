"""`ops.encode_kv` and `ops.decode_kv` by their docstrings, value by value where that is affordable."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_longctx.kernels import ops


def encode_kv(x: Tensor, bits: int) -> ops.Packed:
    """As `ops.encode_kv`."""
    most = 2**bits - 1
    wide = x.float()
    low, high = wide.amin(-1), wide.amax(-1)
    floor = (wide.abs().amax(-1) / 2048).clamp(min=2.0**-14)
    scale = torch.maximum((high - low) / most, floor).half()
    zero = (-low / scale.float()).half()
    payload = (wide / scale.float()[..., None] + zero.float()[..., None]).round().clamp(0, most).to(torch.uint8)
    if bits == 4:
        payload = payload[..., 0::2] | payload[..., 1::2] << 4
    return ops.Packed(payload, scale, zero, bits, x.dtype)


def decode_kv(x: ops.Packed) -> Tensor:
    """As `ops.decode_kv`."""
    payload = x.payload
    if x.bits == 4:
        payload = torch.stack((payload & 15, payload >> 4), -1).flatten(-2)
    return ((payload.float() - x.zero.float()[..., None]) * x.scale.float()[..., None]).to(x.dtype)
