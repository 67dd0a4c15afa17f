"""The stored order of quantized weights, and the way there and back.

A panel is 64 rows; of each, 128 columns of 4-bit codes (64 of 8-bit ones) lie in 4096 bytes side by side, in the order
in which a warp's tensor core takes them: row `64p + 16w + 8h + g` and column `128c + 64b + 32j + 16e + 4t + i` are
nibble e (0: the low one) of byte `((((p * C + c) * 4 + w) * 2 + b) * 32 + 4g + t) * 16 + 4 * (2j + h) + i`, where C is
the number of runs of 128 columns. Column `64c + 32j + 16e + 4t + i` of 8 bits is byte
`((((p * C + c) * 4 + w) * 2 + j) * 32 + 4g + t) * 16 + 4 * (2e + h) + i`, with its highest bit turned over.

So lane `4g + t` of warp w reads 16 bytes at once, and one mask makes four operands of a product. Groups have two
bytes a row, the scale and the zero with its highest bit turned over, rows in the order w, g, h: values become
`code * scale + zero + 128` in one multiplication of four bytes at a time, since none of the sums overflows. Rows and
columns that fill up count as values of zero.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .linear import COLUMNS, GROUPS, LAYOUT, ROWS, Codes, PackedWeight

MOST_COLUMNS = 65536
"""Sums of so many products of two bytes fit into 32 bits."""


def pack(codes: Codes) -> PackedWeight:
    """Bring a weight into stored order, on the device where it lies.

    Raises:
        ValueError: shapes, dtypes or values that are none of a weight; values of two levels that do not fit into int8.
    """
    _check(codes)
    values, (rows, columns) = codes.values, codes.values.shape
    space = (0, -columns % COLUMNS, 0, -rows % ROWS)
    if values.dtype == torch.int8:
        filled = pad(values.view(torch.uint8) ^ 0x80, space, value=0x80)
        parts = filled.view(len(filled) // ROWS, 4, 2, 8, -1, 2, 2, 4, 4)  # p w h g | c j e t i
        stored = parts.permute(0, 4, 1, 5, 3, 7, 6, 2, 8)  # p c w j g t e h i
    else:
        filled = pad(values, space)
        parts = filled.view(len(filled) // ROWS, 4, 2, 8, -1, 2, 2, 2, 4, 4)  # p w h g | c b j e t i
        low, high = parts.permute(0, 4, 1, 5, 3, 8, 6, 2, 9, 7).unbind(-1)  # p c w b g t j h i | e
        stored = low | high << 4
    groups = None
    if codes.group_scale is not None and codes.group_zero is not None:
        group = columns // codes.group_scale.shape[1]
        around = (0, 0, 0, -columns % COLUMNS // group, 0, -rows % ROWS)
        pairs = torch.stack([codes.group_scale.view(torch.uint8), codes.group_zero.view(torch.uint8) ^ 0x80], -1)
        pairs = torch.where(pad(torch.ones_like(pairs), around) == 1, pad(pairs, around), pairs.new_tensor([0, 0x80]))
        groups = pairs.view(len(filled) // ROWS, 4, 2, 8, -1, 2).permute(0, 4, 1, 3, 2, 5)  # p c w g h
        groups = groups.reshape(len(filled) // ROWS, -1, ROWS, 2)
    shift = None if codes.shift is None else codes.shift.float().contiguous()
    stored = stored.reshape(len(filled), -1)
    return PackedWeight(stored, codes.scale.float().contiguous(), shift, groups, columns)


def unpack(weight: PackedWeight) -> Codes:
    """The same weight in its natural order; `pack` brings it back, byte for byte.

    Raises:
        ValueError: the order is none that this version knows.
    """
    if weight.layout != LAYOUT:
        raise ValueError(f"unpack: expected a weight of layout {LAYOUT}; got {weight.layout}. Update the package.")
    (rows, columns), panels = weight.shape, len(weight.codes) // ROWS
    if weight.bits == 8:
        stored = weight.codes.view(panels, -1, 4, 2, 8, 4, 2, 2, 4)  # p c w j g t e h i
        parts = stored.permute(0, 2, 7, 4, 1, 3, 6, 5, 8)
        values = (parts.reshape(panels * ROWS, -1) ^ 0x80).view(torch.int8)
    else:
        stored = weight.codes.view(panels, -1, 4, 2, 8, 4, 2, 2, 4)  # p c w b g t j h i
        parts = torch.stack([stored & 15, stored >> 4], -1).permute(0, 2, 7, 4, 1, 3, 6, 9, 5, 8)
        values = parts.reshape(panels * ROWS, -1)
    group_scale = group_zero = None
    if weight.groups is not None and weight.group is not None:
        pairs = weight.groups.view(panels, -1, 4, 8, 2, 2).permute(0, 2, 4, 3, 1, 5)
        pairs = pairs.reshape(panels * ROWS, -1, 2)[:rows, : columns // weight.group]
        group_scale = pairs[..., 0].contiguous().view(torch.int8)
        group_zero = (pairs[..., 1] ^ 0x80).view(torch.int8)
    return Codes(values[:rows, :columns].contiguous(), weight.scale, weight.shift, group_scale, group_zero)


def int8_values(codes: Codes) -> Tensor:
    """What the integers are that tokens meet: `[N, K]`, int8; without scale and shift."""
    if codes.group_scale is None or codes.group_zero is None:
        return codes.values.view(torch.int8)
    group = codes.values.shape[1] // codes.group_scale.shape[1]
    scale, zero = (x.repeat_interleave(group, 1) for x in (codes.group_scale, codes.group_zero))
    return codes.values.view(torch.int8) * scale + zero  # int8 wraps around


def _refuse(expected: str, got: object, advice: str) -> ValueError:
    return ValueError(f"pack: expected {expected}; got {got}. {advice}")


def _check(codes: Codes) -> None:
    values, levels = codes.values, (codes.group_scale, codes.group_zero)
    if values.ndim != 2 or values.dtype not in (torch.uint8, torch.int8) or not values.numel():
        raise _refuse("values [N, K], uint8 or int8", f"{values.dtype} {list(values.shape)}", "Quantize the weight.")
    rows, columns = values.shape
    if columns % 32 or columns > MOST_COLUMNS:
        raise _refuse(f"columns in multiples of 32, at most {MOST_COLUMNS}", columns, "Leave this weight as it is.")
    four = values.dtype == torch.uint8
    if four and int(values.max()) > 15:
        raise _refuse("codes from 0 to 15", int(values.max()), "Clamp them.")
    forms = (codes.shift is not None, *(x is not None for x in levels))
    if forms not in ([(True, False, False), (False, True, True)] if four else [(False, False, False)]):
        raise _refuse("4 bits with a shift or with groups, or 8 bits with neither", forms, "Pass one form.")
    for name in ("scale", "shift"):
        x = getattr(codes, name)
        if x is not None and (x.shape != (rows,) or not x.is_floating_point()):
            raise _refuse(f"a floating-point {name} [{rows}]", f"{x.dtype} {list(x.shape)}", "Give one per row.")
    if codes.group_scale is not None and codes.group_zero is not None:
        _check_groups(codes, codes.group_scale, codes.group_zero)


def _check_groups(codes: Codes, scale: Tensor, zero: Tensor) -> None:
    rows, columns = codes.values.shape
    fitting = [[rows, columns // group] for group in GROUPS if columns % group == 0]
    for x in (scale, zero):
        if x.dtype != torch.int8 or list(x.shape) not in fitting:
            advice = f"Use groups of {', '.join(map(str, GROUPS))} columns."
            raise _refuse(f"groups, int8, of one of the shapes {fitting}", f"{x.dtype} {list(x.shape)}", advice)
    if scale.shape != zero.shape:
        raise _refuse(f"zeros {list(scale.shape)} as scales", list(zero.shape), "Give one of each to a group.")
    if int(scale.min()) < 0:
        raise _refuse("group scales of at least 0", int(scale.min()), "Turn the codes over.")
    highest = codes.values.view(rows, scale.shape[1], -1).amax(-1).to(torch.int16)
    beyond = highest * scale + zero > 127
    if bool(beyond.any()):
        row, group = beyond.nonzero()[0].tolist()
        raise _refuse("values of both levels within int8", f"more in row {row}, group {group}", "Keep a margin.")
