"""Arguments of attention as the kernels take them, and those that they do not take."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..types import Logits, Packed, Selection, Turns, Visibility, parts

LEAST = 16
"""Rows, columns and channels that a product of two tiles has at least."""
MOST = 256
"""Channels."""
LARGE = 200 << 10
"""Bytes of shared memory with which tiles are larger, as on sm_90."""
COLUMNS, PLACES, LISTS = 0, 1, 2
"""Columns are positions, or have positions of their own, or are those of chosen blocks."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def reject_tensors(q: Tensor, k: Tensor | Packed, v: Tensor | Packed, logits: Logits) -> str | None:
    """Why the kernels do not take these tensors, or None."""
    if 0 in (q.numel(), k.shape[2], v.shape[3]):
        return "takes no empty tensors"
    inputs = [x for x in (q, k, v, logits.sink_logits, logits.slopes) if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return "computes no gradients"
    if {k.device, v.device} != {q.device}:
        return "needs queries, keys and values on one device"
    reason = reject_dtypes("queries, keys and values", q, k, v)
    if reason is not None:
        return reason
    if bits_of(k) != bits_of(v):
        return "needs keys and values in one format"
    if max(q.shape[3], v.shape[3]) > MOST:
        return f"takes at most {MOST} channels"
    reason = reject_stored(k, v)
    return reason if reason is not None or logits.scale > 0 else "needs a scale above zero"


def reject_stored(*stored: Tensor | Packed) -> str | None:
    """Why the kernels do not read keys or values as they lie, or None."""
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for y in stored for x in parts(y)):
        return "needs channels that lie side by side"
    if any(x.scale.stride() != x.zero.stride() for x in stored if isinstance(x, Packed)):
        return "needs scales and zeros that lie alike"
    return None


def reject_dtypes(what: str, first: Tensor, *others: Tensor | Packed) -> str | None:
    """Why the kernels do not take these dtypes, or None."""
    if any(x.dtype != first.dtype for x in others) or first.dtype not in DTYPES:
        return f"needs {what} in one dtype, float32, float16 or bfloat16"
    if first.dtype == torch.bfloat16 and not first.is_cuda:
        return "has no bfloat16 in Triton's interpreter, which gets it wrong"
    return None


def reject_turns(logits: Logits, turns: Turns | None) -> str | None:
    """Why a kernel that turns nothing does not take these turns, or None."""
    turned = turns is not None and (turns.inv_freq is not None or logits.slopes is not None)
    return "cannot turn queries to keys at lap positions" if turned else None


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def bits_of(x: Tensor | Packed) -> int:
    """Of a stored number; 0 where it is not packed."""
    return x.bits if isinstance(x, Packed) else 0


def width_of(channels: int, bits: int = 0) -> int:
    """Of a tile that holds so many channels; of 4 bits, half of them."""
    return max(LEAST, 1 << ((channels // 2 if bits == 4 else channels) - 1).bit_length())


def rows_of(x: Tensor | Packed) -> tuple[Any, ...]:
    """Stored keys or values: addresses of rows, scales and zeros, and how far rows, heads and columns are apart."""
    if isinstance(x, Tensor):
        return (x, x, x, *x.stride()[:3], 0, 0, 0)
    return (x.payload, x.scale, x.zero, *x.payload.stride()[:3], *x.scale.stride())


def places_of(see: Visibility, device: torch.device) -> tuple[Any, ...]:
    """Positions of queries and keys and what lies between them in a row, sinks, window."""
    found: list[Any] = []
    for pos in (see.q_pos, see.k_pos):
        here = None if pos is None else pos.to(device).contiguous()
        found += [here, 0 if here is None or len(here) == 1 else here.shape[1]]
    return (*found, see.sink, 0 if see.window is None else see.window)


def lists_of(selection: Selection | None) -> tuple[Any, ...] | None:
    """Blocks, their pages, strides of both, lists of a row, tokens and number of blocks, queries of a list."""
    if selection is None:
        return None
    ids, pages = selection.ids, selection.pages
    if (pages is not None and pages.stride() != ids.stride()) or ids.stride(-1) != 1:
        ids, pages = ids.contiguous(), None if pages is None else pages.contiguous()
    q_block = selection.q_block if ids.shape[2] > 1 else 1 << 30
    pages = ids if pages is None else pages
    return (ids, pages, *ids.stride()[:3], ids.shape[1], selection.block, ids.shape[3], q_block)


def arguments_of(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    out: Tensor,
    logits: Logits,
    see: Visibility,
    selection: Selection | None,
) -> tuple[tuple[Any, ...], dict[str, int]]:
    """The first arguments of a kernel of attention, and those that it is compiled for."""
    heads = [
        None if x is None else x.detach().to(q.device, torch.float32).contiguous()
        for x in (logits.sink_logits, logits.slopes)
    ]
    tensors = ((q, *q.stride()[:3]), rows_of(k), rows_of(v), (out, *out.stride()[:3]))
    numbers = (q.shape[2], k.shape[2], logits.scale, logits.softcap or 1.0)
    flags = {
        "GROUP": q.shape[1] // k.shape[1],
        "DIM": q.shape[3],
        "WIDTH": width_of(q.shape[3], bits_of(k)),
        "V_DIM": v.shape[3],
        "V_WIDTH": width_of(v.shape[3], bits_of(v)),
        "BITS": bits_of(k),
        "MODE": LISTS if selection is not None else COLUMNS if see.k_pos is None else PLACES,
        "GIVEN": see.q_pos is not None,
        "WINDOWED": see.window is not None and selection is None,
        "CAPPED": logits.softcap is not None,
        "SUNK": logits.sink_logits is not None,
        "SLOPED": logits.slopes is not None,
    }
    return (*tensors, places_of(see, q.device), lists_of(selection), *heads, *numbers), flags


def tile_of(q: Tensor, channels: int, simple: bool, listed: bool) -> tuple[int, int, dict[str, int]]:
    """Queries and keys of a tile of `attend_blocks`, and how it is compiled.

    Args:
        q: queries.
        channels: of keys or values, the larger number.
        simple: keys are not packed, and logits are products.
        listed: over chosen blocks. Then so few registers are used on sm_90 that two programs have room: one multiplies
            while the other waits for its softmax.
    """
    if q.dtype == torch.float32:
        rows, keys, warps = (64, 32, 4) if channels <= 128 else (32, 16, 4)
    elif channels > 128:
        rows, keys, warps = 64, 32, 4
    elif not simple or shared_of(q.device) < LARGE:
        rows, keys, warps = 128, 64, 4
    else:
        rows, keys, warps = 128, 128, 8
        if listed and channels > 64:
            return rows, 64, {"num_warps": warps, "STAGES": 2, "maxnreg": 128}
    return rows, keys, {"num_warps": warps, "STAGES": 2}


@cache
def shared_of(device: torch.device) -> int:
    """Bytes of shared memory of a program, at most."""
    if device.type != "cuda":
        return 0
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)


def tiles_of(x: Tensor | Packed, keys: int) -> tuple[Any, tuple[int, int, int]] | None:
    """Stored keys or values as a matrix from which the device copies tiles by itself, and where rows and heads begin.

    Heads lie one below the other, or side by side. None: they cannot be read in this way.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    if not isinstance(x, Tensor) or x.dtype == torch.float32 or x.shape[3] != width_of(x.shape[3]):
        return None
    b, h, t, _ = x.stride()
    side = x.shape[1] > 1 and h < t
    width = x.shape[1] * x.shape[3] if side else x.shape[3]
    if x.data_ptr() % 16 or t % 8 or t < width or (len(x) > 1 and b % t) or (x.shape[1] > 1 and h % (8 if side else t)):
        return None
    b, h = b // t if len(x) > 1 else 0, h if x.shape[1] > 1 else 0
    rows = b * (len(x) - 1) + (0 if side else h // t * (x.shape[1] - 1)) + x.shape[2]
    whole = TensorDescriptor(
        x, [rows, h * (x.shape[1] - 1) + x.shape[3] if side else width], [t, 1], [keys, x.shape[3]]
    )
    return whole, (b, 0 if side else h // t, h if side else 0)
