"""`ops.attend_pages` in the compiled library."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..dispatch import Implementation
from ..reference.rotate import rotate
from ..reference.weigh import empty_out, positions
from ..types import Logits, Packed, Selection, Turns, Visibility
from . import library, prefill
from .library import HflAttend, pointer

CUDA_DIMS = (64, 96, 128, 256)


def reject(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> str | None:
    """Why the library does not take these arguments, or None."""
    reason = library.reason(q.device)
    if reason is not None:
        return reason
    if q.shape[2] > library.FEW:
        return f"takes at most {library.FEW} queries a row"
    if _clamped(turns) and q.is_cuda:
        return prefill.reject(q, k, v, logits, see, turns, selection)
    if 0 in (q.numel(), k.shape[2]):
        return "takes no empty tensors"
    inputs = [x for x in (q, k, v, logits.sink_logits) if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return "computes no gradients"
    if {k.device, v.device} != {q.device}:
        return "needs queries, keys and values on one device"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in library.DTYPES:
        return "needs queries, keys and values in one dtype, float32, float16 or bfloat16"
    if any(isinstance(x, Tensor) and x.stride(-1) != 1 for x in (q, k, v)):
        return "needs channels that lie side by side"
    return (
        _reject_turns(logits, turns)
        or _reject_selection(q, selection)
        or (_reject_on_cuda(q, k, v, selection) if q.is_cuda else None)
    )


def _clamped(turns: Turns | None) -> bool:
    """True where far keys are turned, which on CUDA only the kernel of many queries does."""
    return turns is not None and turns.clamp is not None


def _reject_turns(logits: Logits, turns: Turns | None) -> str | None:
    if _clamped(turns):
        return "cannot clamp distances on a CPU"
    if turns is not None and logits.slopes is not None:
        return "has no ALiBi at lap positions"
    return None


def _reject_selection(q: Tensor, selection: Selection | None) -> str | None:
    if selection is not None and selection.q_block > 1 and selection.ids.shape[2] > 1:
        return "takes a selection for each query, or one for all"
    return None


def _reject_on_cuda(q: Tensor, k: Tensor | Packed, v: Tensor | Packed, selection: Selection | None) -> str | None:
    if q.dtype == torch.float32:
        return "has no float32 on CUDA"
    if q.shape[3] not in CUDA_DIMS or v.shape[3] != q.shape[3]:
        return f"takes {', '.join(map(str, CUDA_DIMS))} channels, of keys and of values, on CUDA"
    if library.bits(k) != library.bits(v):
        return "needs keys and values in one format"
    if q.shape[0] * k.shape[1] > 65535:
        return "takes at most 65535 rows * KV heads"
    tensors = [x if isinstance(x, Tensor) else x.payload for x in (k, v)]
    scales = [scale for x in (k, v) if isinstance(x, Packed) for scale in (x.scale, x.zero)]
    if not all(library.aligned(x) for x in (*tensors, *scales)):
        return "needs rows that begin at multiples of 16 bytes"
    if scales and selection is not None and selection.block % 8:
        return "needs blocks of a multiple of 8 tokens where keys are packed"
    return None


def attend_pages(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> Tensor:
    """`ops.attend_pages`."""
    if _clamped(turns):
        return prefill.attend_blocks(q, k, v, logits, see, turns, selection)
    q = library.laid_out(q)
    out = empty_out(q, v.shape[3])
    block, held = arguments(out, q, k, v, logits, see, turns, selection)
    if q.is_cuda:
        held += split(block, q.device)
    library.run("attend", block, q.device)
    del held  # until here the tensors that the block points to had to live
    return out


def split(block: HflAttend, device: torch.device) -> list[Tensor]:
    """Cut the columns into parts for a device; returns what must live as long as the argument block."""
    with torch.cuda.device(device):
        splits = ctypes.c_int32()
        scratch_bytes = library.library().hfl_attend_scratch(ctypes.byref(block), ctypes.byref(splits))
        block.splits = splits.value
        if splits.value <= 1:
            return []
        scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=device)
        block.scratch = scratch.data_ptr()
        block.counters = library.counters(device, library.library().hfl_attend_counters(ctypes.byref(block))).data_ptr()
        return [scratch]


def arguments(
    out: Tensor,
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None,
) -> tuple[HflAttend, list[Tensor]]:
    """The argument block, and tensors made for it, which must live as long."""
    block = HflAttend(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    block.dtype, block.k, block.v = library.DTYPES[q.dtype], library.rows(k), library.rows(v)
    block.out, (block.out_b, block.out_h, block.out_t) = out.data_ptr(), out.stride()[:3]
    block.scale, block.softcap = logits.scale, logits.softcap or 0.0
    block.sink, block.window = see.sink, -1 if see.window is None else see.window
    floats = [
        None if x is None else x.detach().to(q.device, torch.float32) for x in (logits.sink_logits, logits.slopes)
    ]
    places = [None if x is None else x.to(q.device).contiguous() for x in (see.q_pos, None if selection else see.k_pos)]
    block.sink_logits, block.slopes = map(pointer, floats)
    block.q_pos, block.k_pos = map(pointer, places)
    block.q_pos_b, block.k_pos_b = (0 if x is None or len(x) == 1 else x.shape[1] for x in places)
    held = [x for x in (*floats, *places) if x is not None]
    if turns is not None and turns.inv_freq is not None:
        q = q.contiguous()
        own = positions(see, q.shape[2], k.shape[2], q.device)[0]
        before = _turned(q, torch.full_like(own, turns.lap), turns)
        sinks = _turned(q, turns.sink_pos.to(q.device) - (own - turns.lap * turns.laps(own)), turns)
        block.q_before, block.q_sinks, block.lap, block.offset = (
            pointer(before),
            pointer(sinks),
            turns.lap,
            turns.offset,
        )
        held += [before, sinks]
    block.q, (block.q_b, block.q_h, block.q_t) = q.data_ptr(), q.stride()[:3]
    held.append(q)
    if selection is not None:
        held += _select(block, selection)
    return block, held


def _turned(q: Tensor, delta: Tensor, turns: Turns) -> Tensor:
    """Queries turned by `delta` `[B or 1, T]`, laid out as q."""
    assert turns.inv_freq is not None
    return rotate(q.float(), delta, turns.inv_freq, turns.interleaved).to(q.dtype).contiguous()


def _select(block: HflAttend, selection: Selection) -> list[Tensor]:
    """Fill in the selection; returns what must live as long as the block."""
    ids, pages = selection.ids, selection.pages
    if (pages is not None and pages.stride() != ids.stride()) or ids.stride(-1) != 1:
        ids, pages = ids.contiguous(), None if pages is None else pages.contiguous()
    block.ids, block.pages = ids.data_ptr(), pointer(pages)
    block.ids_b, block.ids_h, block.ids_n = ids.stride()[:3]
    block.select_heads, block.chosen, block.block = ids.shape[1], ids.shape[3], selection.block
    if ids.shape[2] == 1:
        block.ids_n = 0  # one list for all queries
    return [ids] if pages is None else [ids, pages]


OPS = {"attend_pages": Implementation(attend_pages, reject)}
