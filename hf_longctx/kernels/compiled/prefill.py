"""`ops.attend_blocks` in the compiled library, on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Implementation
from ..reference.weigh import empty_out
from ..types import Logits, Packed, Selection, Turns, Visibility
from . import library
from .library import HflPrefill, pointer

DIMS = (64, 96, 128, 256)
KEYS = 64
"""A block of a selection holds whole tiles of so many keys."""
QUERIES = 128
"""A block of queries holds whole tiles of so many."""


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
    reason = library.reason_on_cuda(q, "has many queries a row on CUDA only")
    if reason is not None:
        return reason
    if 0 in (q.numel(), k.shape[2]):
        return "takes no empty tensors"
    if not isinstance(k, Tensor) or not isinstance(v, Tensor):
        return "takes no packed keys and values of many queries"
    inputs = [x for x in (q, k, v, logits.sink_logits, logits.slopes) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return "computes no gradients"
    return (
        _reject_tensors(q, k, v)
        or _reject_places(logits, see, turns, selection)
        or _reject_selection(selection)
        or _reject_dense(q, k, logits, see, selection)
    )


def _reject_tensors(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if {k.device, v.device} != {q.device}:
        return "needs queries, keys and values on one device"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float16, torch.bfloat16):
        return "needs queries, keys and values in one dtype, float16 or bfloat16"
    if q.shape[3] not in DIMS or v.shape[3] != q.shape[3]:
        return f"takes {', '.join(map(str, DIMS))} channels, of keys and of values"
    if not all(x.stride(-1) == 1 and library.aligned(x) for x in (k, v)):
        return "needs rows that begin at multiples of 16 bytes"
    return None


def _reject_places(logits: Logits, see: Visibility, turns: Turns | None, selection: Selection | None) -> str | None:
    if turns is not None and (turns.inv_freq is not None or logits.slopes is not None):
        return "cannot turn many queries to keys at lap positions"
    if selection is None and see.k_pos is not None:
        return "needs columns that are positions"
    return None if logits.scale > 0 else "needs a scale above zero"


def _reject_selection(selection: Selection | None) -> str | None:
    if selection is None:
        return None
    if selection.block % KEYS:
        return f"takes blocks of a multiple of {KEYS} keys"
    if selection.q_block % QUERIES:
        return f"takes blocks of a multiple of {QUERIES} queries"
    return None if selection.ids.numel() else "takes no empty lists"


def _reject_dense(q: Tensor, k: Tensor, logits: Logits, see: Visibility, selection: Selection | None) -> str | None:
    """Causal attention of a whole text is what torch's kernels are fastest at."""
    stored = k.shape[2]
    whole = see.aligned and q.shape[2] == stored and (see.window is None or see.window >= stored)
    return "leaves plain causal attention to torch" if selection is None and whole and logits.plain else None


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> Tensor:
    """`ops.attend_blocks`."""
    q = library.laid_out(q)
    out = empty_out(q, v.shape[3])
    block = HflPrefill(q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    block.dtype = library.DTYPES[q.dtype]
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        setattr(block, name, x.data_ptr())
        for axis, stride in zip("bht", x.stride(), strict=False):
            setattr(block, f"{name}_{axis}", stride)
    block.scale, block.softcap = logits.scale, logits.softcap or 0.0
    block.sink, block.window = see.sink, -1 if see.window is None else see.window
    floats = [
        None if x is None else x.detach().to(q.device, torch.float32).contiguous()
        for x in (logits.sink_logits, logits.slopes)
    ]
    block.sink_logits, block.slopes = map(pointer, floats)
    q_pos = None if see.q_pos is None else see.q_pos.to(q.device).contiguous()
    block.q_pos, block.q_pos_b = pointer(q_pos), 0 if q_pos is None or len(q_pos) == 1 else q_pos.shape[1]
    lists = _select(block, selection)
    block.counter = library.counters(q.device, 1).data_ptr()
    library.run("prefill", block, q.device)
    del floats, lists  # until here the tensors that the block points to had to live
    return out


def _select(block: HflPrefill, selection: Selection | None) -> tuple[Tensor | None, Tensor | None]:
    """Fill in the selection; returns what must live as long as the block."""
    if selection is None:
        return None, None
    ids, pages = selection.ids, selection.pages
    if (pages is not None and pages.stride() != ids.stride()) or ids.stride(-1) != 1:
        ids, pages = ids.contiguous(), None if pages is None else pages.contiguous()
    block.ids, block.pages = ids.data_ptr(), pointer(pages)
    block.ids_b, block.ids_h, block.ids_n = ids.stride()[:3]
    block.select_heads, block.chosen = ids.shape[1], ids.shape[3]
    block.block, block.q_block = selection.block, selection.q_block
    return ids, pages


OPS = {"attend_blocks": Implementation(attend_blocks, reject)}
