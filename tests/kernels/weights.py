"""Random quantized weights and tokens."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch

from hf_longctx.kernels import linear
from hf_longctx.kernels.linear import Codes, PackedWeight, Tokens

T = TypeVar("T", Tokens, PackedWeight)

FORMS = ("channel", "group 32", "group 64", "group 128", "bytes")


def random_codes(form: str, rows: int, columns: int, seed: int = 0) -> Codes:
    """A weight of a form, whose values take up all of their range."""
    made = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, generator=made) * 0.01 + 0.001
    if form == "bytes":
        values = torch.randint(-128, 128, (rows, columns), generator=made).to(torch.int8)
        return Codes(values, scale)
    values = torch.randint(0, 16, (rows, columns), generator=made).to(torch.uint8)
    if form == "channel":
        return Codes(values, scale, scale * torch.randint(0, 16, (rows,), generator=made))
    groups = columns // int(form.split()[1])
    steps = torch.randint(1, 18, (rows, groups), generator=made)
    room = 255 - 15 * steps  # of the least value above -128
    zero = (torch.rand(rows, groups, generator=made) * (room + 1)).long() - 128
    return Codes(values, scale, None, steps.to(torch.int8), zero.to(torch.int8))


def random_tokens(rows: int, columns: int, seed: int = 1) -> Tokens:
    """Quantized activations, of which some channels are large."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=made) * torch.rand(columns, generator=made).pow(4)
    return linear.quantize_tokens(x)


def moved(x: T, device: str) -> T:
    """The same tokens, or weight, on a device."""
    fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}  # type: ignore[arg-type]
    there = {name: y.to(device) if isinstance(y, torch.Tensor) else y for name, y in fields.items()}
    return type(x)(**there)
