"""`ops.attend_blocks` in the compiled library, on CUDA."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..dispatch import Implementation
from ..reference.weigh import empty_out
from ..types import Logits, Packed, Selection, Turns, Visibility, parts
from . import library
from .library import HflPrefill, pointer

DIMS = (64, 96, 128, 256)
KEYS = 64
"""A block of a selection holds whole tiles of so many keys."""
QUERIES = 128
"""A block of queries holds whole tiles of so many."""
LONG, WIDE = 2048, 128
"""Queries of a whole causal text, and channels, from which on the kernel of sm_90a is faster than those of torch."""
LONG_OF_SOME = 1024
"""As `LONG`, for some heads of a layer, which torch must have apart."""
PAIRS = 8
"""So many pairs of channels are turned at a time."""


def reject(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
    long: int = LONG,
) -> str | None:
    """Why the library does not take these arguments, or None; long: from how many queries on it takes causal texts."""
    reason = library.reason_on_cuda(q, "has many queries a row on CUDA only")
    reason = reason or _reject_dense(q, k, logits, see, turns, selection, long)
    if reason is not None:
        return reason
    if 0 in (q.numel(), k.shape[2]):
        return "takes no empty tensors"
    if k.shape[2] < q.shape[2] and (see.q_pos is None or see.k_pos is not None):
        return "takes no more queries than keys, where columns say which query stands at which key"
    inputs = [x for x in (q, k, v, logits.sink_logits, logits.slopes) if isinstance(x, Tensor)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return "computes no gradients"
    return _reject_tensors(q, k, v) or _reject_turns(logits, turns) or _reject_selection(selection)


def _reject_tensors(q: Tensor, k: Tensor | Packed, v: Tensor | Packed) -> str | None:
    if {k.device, v.device} != {q.device}:
        return "needs queries, keys and values on one device"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float16, torch.bfloat16):
        return "needs queries, keys and values in one dtype, float16 or bfloat16"
    if q.shape[3] not in DIMS or v.shape[3] != q.shape[3]:
        return f"takes {', '.join(map(str, DIMS))} channels, of keys and of values"
    if library.bits(k) != library.bits(v):
        return "needs keys and values in one format"
    tensors = [y.squeeze(-1) for x in (k, v) for y in parts(x)]
    if not all(x.stride(-1) == 1 and library.aligned(x) for x in tensors):
        return "needs rows that begin at multiples of 16 bytes"
    return None


def _reject_turns(logits: Logits, turns: Turns | None) -> str | None:
    if turns is not None and turns.inv_freq is not None and len(turns.inv_freq) % PAIRS:
        return f"turns pairs of channels in multiples of {PAIRS}"
    if turns is not None and logits.slopes is not None:
        return "has no ALiBi at lap positions"
    return None if logits.scale > 0 else "needs a scale above zero"


def _reject_selection(selection: Selection | None) -> str | None:
    if selection is None:
        return None
    if selection.block % KEYS:
        return f"takes blocks of a multiple of {KEYS} keys"
    if selection.q_block % QUERIES and selection.ids.shape[2] > 1:
        return f"takes blocks of a multiple of {QUERIES} queries"
    return None if selection.ids.numel() else "takes no empty lists"


def _reject_dense(
    q: Tensor,
    k: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None,
    long: int,
) -> str | None:
    """Causal attention of a whole text is what torch's kernels are fastest at, but for a long one on sm_90."""
    stored = k.shape[2]
    whole = see.aligned and q.shape[2] == stored and (see.window is None or see.window >= stored)
    dense = selection is None and turns is None and whole and logits.plain
    if dense and isinstance(k, Tensor) and stored >= long and q.shape[3] == WIDE and _has_tiles(q.device):
        return None
    return "leaves plain causal attention to torch" if dense else None


@cache
def _has_tiles(device: torch.device) -> bool:
    """True if the kernel of sm_90a runs, which multiplies tiles in shared memory."""
    return "sm_90a" in library.about() and torch.cuda.get_device_capability(device) == (9, 0)


def attend_blocks(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> Tensor:
    """`ops.attend_blocks`."""
    q = library.laid_out(q)
    out = empty_out(q, v.shape[3])
    _attend(q, k, v, logits, see, turns, selection, None, out)
    return out


def reject_heads(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None,
    heads: Tensor,
    out: Tensor,
) -> str | None:
    """Why the library does not take these arguments, or None."""
    if heads.device != q.device or out.device != q.device or out.dtype != q.dtype:
        return "needs queries, heads and results on one device, and results in the dtype of the queries"
    if out.stride(-1) != 1 or (out.is_cuda and not library.aligned(out)):
        return "needs rows that begin at multiples of 16 bytes"
    return reject(q, k, v, logits, see, turns, selection, LONG_OF_SOME)


def attend_heads(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None,
    heads: Tensor,
    out: Tensor,
) -> None:
    """`ops.attend_heads`."""
    _attend(library.laid_out(q), k, v, logits, see, turns, selection, heads, out)


def _attend(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None,
    heads: Tensor | None,
    out: Tensor,
) -> None:
    """Into `out`; of all heads, or of `heads` of them."""
    count = q.shape[1] if heads is None else len(heads)
    block = HflPrefill(q.shape[0], count, k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    block.places, block.all_heads = pointer(heads), q.shape[1]
    block.dtype, block.k, block.v = library.DTYPES[q.dtype], library.rows(k), library.rows(v)
    block.q, (block.q_b, block.q_h, block.q_t) = q.data_ptr(), q.stride()[:3]
    block.out, (block.out_b, block.out_h, block.out_t) = out.data_ptr(), out.stride()[:3]
    block.scale, block.softcap = logits.scale, logits.softcap or 0.0
    block.sink, block.window = see.sink, -1 if see.window is None else see.window
    floats = [
        None if x is None else x.detach().to(q.device, torch.float32).contiguous()
        for x in (logits.sink_logits, logits.slopes)
    ]
    block.sink_logits, block.slopes = map(pointer, floats)
    places = [_place(block, "q_pos", see.q_pos, q), _place(block, "k_pos", None if selection else see.k_pos, q)]
    lists = _select(block, selection)
    block.counter = library.counters(q.device, 1).data_ptr()
    turned = _turn(block, q, see, turns, selection)
    library.run("prefill", block, q.device)
    del floats, places, lists, turned  # until here the tensors that the block points to had to live


def _place(block: HflPrefill, name: str, pos: Tensor | None, q: Tensor) -> Tensor | None:
    """Fill in positions `[B or 1, ?]`; returns what must live as long as the block."""
    if pos is None:
        return None
    pos = pos.to(q.device).contiguous()
    setattr(block, name, pos.data_ptr())
    setattr(block, f"{name}_b", 0 if len(pos) == 1 else pos.shape[1])
    return pos


def _turn(
    block: HflPrefill, q: Tensor, see: Visibility, turns: Turns | None, selection: Selection | None
) -> list[Tensor | None]:
    """Fill in how queries are turned; returns what must live as long as the block."""
    if turns is None or turns.inv_freq is None:
        return []
    block.lap, block.offset, block.clamp = turns.lap, turns.offset, turns.clamp or 0
    frequencies = turns.inv_freq.to(q.device, torch.float32).contiguous()
    block.inv_freq, block.pairs, block.interleaved = pointer(frequencies), len(frequencies), turns.interleaved
    elsewhere = selection is None and turns.clamp is None and see.sink > 0
    return [frequencies, _place(block, "sink_pos", turns.sink_pos if elsewhere else None, q)]


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
    block.block, block.q_block = selection.block, -(-selection.q_block // QUERIES) * QUERIES  # only one may be cut
    return ids, pages


OPS = {
    "attend_blocks": Implementation(attend_blocks, reject),
    "attend_heads": Implementation(attend_heads, reject_heads),
}
