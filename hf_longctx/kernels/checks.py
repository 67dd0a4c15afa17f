"""What is looked at before an operation runs where HF_LONGCTX_DEBUG is set: numbers that lie on the device.

To look waits for the device, so calls go unchecked otherwise: then what points outside is not read and not written, a
key after its query is not seen, and of a list that is not ascending nobody says what is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .reference.weigh import positions
from .step import GroupStep
from .types import Packed, Places, Selection, Visibility


def check(op: str, args: Sequence[Any]) -> None:
    """Look at the arguments of an operation; not while a graph is recorded, as then nothing is computed.

    Raises:
        ValueError: a list of blocks that is not ascending, names a block twice, points outside or after its queries;
            a token whose place is outside the store; a slot or a weight that there is not.
    """
    look = _CHECKS.get(op)
    recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if look is not None and not recording:
        look(op, *args)


def _refuse(where: str, what: str, wrong: Tensor, values: Tensor, do: str) -> None:
    """Refuse if anything is wrong, and show the first such row of `values`, whose last axis is a list."""
    if not bool(wrong.any()):
        return
    at = wrong.flatten(0, -2).any(-1).nonzero()[0, 0] if wrong.ndim > 1 else 0
    line = values.expand(wrong.shape).flatten(0, -2)[at] if wrong.ndim > 1 else values
    shown = ", ".join(str(x) for x in line[:12].tolist()) + (", ..." if line.shape[0] > 12 else "")
    raise ValueError(f"{where}: expected {what}; got [{shown}]. {do}.")


def _list(where: str, ids: Tensor, blocks: int | None) -> None:
    """Blocks ascend, then -1 for none; below `blocks`, if that is a bound."""
    there, do = ids >= 0, "Sort each list, name every block once, and fill up with -1"
    wrong = ids < -1
    wrong[..., 1:] |= there[..., 1:] & ((ids[..., 1:] <= ids[..., :-1]) | ~there[..., :-1])
    _refuse(where, "lists of blocks that ascend, then -1", wrong, ids, do)
    if blocks is not None:
        _refuse(where, f"blocks from 0 to {blocks - 1}", ids >= blocks, ids, "Leave out blocks that are not stored")


def _selected(
    op: str, q: Tensor, k: Tensor | Packed, v: Any, logits: Any, see: Visibility, turns: Any, chosen: Any, *others: Any
) -> None:
    if chosen is None:
        return
    selection: Selection = chosen
    ids, pages, stored = selection.ids, selection.pages, k.shape[2]
    blocks = -(-stored // selection.block)
    _list(op, ids, blocks if pages is None else None)
    if pages is not None:
        wrong = (ids >= 0) & ((pages < 0) | (pages >= blocks))
        _refuse(op, f"pages from 0 to {blocks - 1}", wrong, pages, "Give each block of the list its page")
    if op == "attend_pages":
        return  # what is chosen for some steps may name a block that begins at a later one
    q_pos = positions(see, q.shape[2], stored, q.device)[0]
    q_pos = pad(q_pos, (0, ids.shape[2] * selection.q_block - q_pos.shape[1]), value=-1)
    last = torch.unflatten(q_pos, 1, (-1, selection.q_block)).amax(-1)
    wrong = (ids >= 0) & (ids.long() * selection.block > last[:, None, :, None])
    _refuse(op, "blocks that begin at or before the last of their queries", wrong, ids, "Leave out what is yet to come")


def _append(op: str, store: Tensor, fresh: Tensor, slots: Tensor | int, written: Any) -> None:
    capacity = store.shape[2]
    if isinstance(slots, int):
        end = slots + fresh.shape[2]
        if slots < 0 or end > capacity:
            raise ValueError(f"{op}: expected slots below {capacity}; got {slots} to {end - 1}. Make room first.")
        return
    _refuse(op, f"slots below {capacity}", (slots < 0) | (slots >= capacity), slots, "Make room first")


def _append_pages(
    op: str, k_store: Any, v: Any, k: Any, fresh_v: Any, pos: Tensor, sink: int, ring: Any, *_: Any
) -> None:
    _places(op, pos, k_store.shape[2], sink, ring)


def _places(op: str, pos: Tensor, capacity: int, sink: int, ring: int | None) -> None:
    slot = pos if ring is None else torch.where(pos < sink, pos, sink + (pos - sink) % ring)
    wrong = (pos >= 0) & (slot >= capacity)
    _refuse(op, f"tokens whose slots are below {capacity}", wrong, pos, "Make room before tokens are stored")
    taken = torch.where(pos < 0, -1 - torch.arange(pos.shape[1], device=pos.device), slot).sort(1).values
    twice = pad(taken[:, 1:] == taken[:, :-1], (0, 1))
    _refuse(op, "tokens that each have a slot", twice, pos, "Store fewer tokens at a time than go round")


def _layer(op: str, q: Any, k: Any, v: Any, logits: Any, groups: Sequence[GroupStep]) -> None:
    for group in groups:
        capacity = group.k.shape[2]
        assert group.see.q_pos is not None
        _places(op, group.see.q_pos, capacity, group.sink, group.ring)
        if group.ids is not None and group.choice is None:
            _list(op, group.ids, -(-capacity // group.block))


def _brought(
    op: str, k: Any, v: Any, host: Any, ids: Tensor, lengths: Any, pool: Any, counts: Any, places: Places
) -> None:
    _list(op, ids, None)


def _slots(op: str, *args: Any) -> None:
    slots, bits = args[-1], args[-3]
    most = len(bits if isinstance(bits, Tensor) else bits[0]) - 1
    _refuse(op, f"slots from -1 to {most}", (slots < -1) | (slots > most), slots, "Name slots that there are")


def _of_row(op: str, x: Any, weight: Tensor, eps: Any, offset: Any, early: Any, of_row: Tensor | None = None) -> None:
    if of_row is not None:
        wrong, most = (of_row < 0) | (of_row >= len(weight)), len(weight) - 1
        _refuse(op, f"numbers of weights from 0 to {most}", wrong, of_row, "Name weights that there are")


_CHECKS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("attend_blocks", "attend_pages", "attend_heads", "attend_mass"), _selected),
    "attend_layer": _layer,
    "append": _append,
    "append_pages": _append_pages,
    "bring_blocks": _brought,
    "rms_norm": _of_row,
    **dict.fromkeys(("delta_linear", "linear_with_delta", "linears_with_delta"), _slots),
}
