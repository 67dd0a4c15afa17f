"""Attention over selected blocks: their keys are gathered, a few blocks of queries at a time, and then all there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..types import Logits, Packed, Selection, Turns, Visibility
from .kv import read
from .weigh import LOGITS_PER_BLOCK, average, empty_out, join, positions, turn_keys, weigh

WIDER = 16
"""How many times as many logits an accelerator has at a time: with fewer it would wait for the next launch."""

EVERYTHING = Visibility()
"""A query sees all keys of its blocks at or before its own position."""


@dataclass(frozen=True)
class Part:
    """What queries at the same places of n blocks weigh, the rows and blocks `[B * n]` as one axis.

    Args:
        blocks: which n blocks of queries.
        rows: which queries of the call; of one block some, of more than one all (t a block, but for a short last one).
        weights: `[B * n, H, G, t, L]`, before division.
        total: `[B * n, H, G, t, 1]`.
        v: `[B * n, H, L, Dv]`.
        q_pos: `[B * n, 1, t]`, int64.
        k_pos: `[B * n, H or 1, L]`, int64, -1 for no key.
        far: keys, the first ones, that may be outside the local window of a query.
    """

    blocks: slice
    rows: slice
    weights: Tensor
    total: Tensor
    v: Tensor
    q_pos: Tensor
    k_pos: Tensor
    far: int | None

    def attend(self, dtype: torch.dtype) -> Tensor:
        """`[B, Hq, n * t, Dv]`."""
        out = average(self.weights, self.total, self.v, dtype)
        out = self._apart(out).flatten(2, 3)
        return out[:, :, : self.rows.stop - self.rows.start]

    def mass(self, near: int) -> Tensor:
        """Attention that each key got from queries less than `near` away: `[B, H, n, L]`."""
        away = self.k_pos[..., None, : self.far] <= (self.q_pos - near)[..., None]
        weights = self.weights.detach() / self.total.detach()
        weights[..., : self.far].masked_fill_(away[:, :, None], 0.0)
        return self._apart(weights.sum((2, 3)))

    def _apart(self, x: Tensor) -> Tensor:
        """Rows and blocks as two axes: `[B * n, H, ...]` to `[B, H, n, ...]`."""
        return torch.unflatten(x, 0, (-1, self.blocks.stop - self.blocks.start)).transpose(1, 2)


def attend_selected(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection,
) -> Tensor:
    """The definition of `ops.attend_blocks` and `ops.attend_pages` with a selection."""
    count, most = selection.ids.shape[2:]
    filled = [most] * count  # a query that chooses for itself leaves few places empty, and is not waited for
    if selection.q_block > 1:
        filled = (selection.ids >= 0).sum(-1).amax((0, 1)).tolist()  # a wait for the device: no empty place is read
    parts = ((part.rows, part.attend(q.dtype)) for part in _parts(q, k, v, logits, see, turns, selection, filled))
    return join(parts, empty_out(q, v.shape[3]))


def attend_mass(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection,
    near: int,
) -> tuple[Tensor, Tensor]:
    """The definition of `ops.attend_mass`."""
    rows, _, count, chosen = selection.ids.shape
    filled = [chosen] * count
    dtype = torch.promote_types(q.dtype, torch.float32)
    mass = torch.zeros(rows, k.shape[1], count, chosen * selection.block, dtype=dtype, device=q.device)

    def attended() -> Iterator[tuple[slice, Tensor]]:
        for part in _parts(q, k, v, logits, see, turns, selection, filled):
            mass[:, :, part.blocks, : part.k_pos.shape[-1]] += part.mass(near)
            yield part.rows, part.attend(q.dtype)

    return join(attended(), empty_out(q, v.shape[3])), mass


def _parts(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection,
    filled: list[int],
) -> Iterator[Part]:
    """Queries in order: some blocks at a time, or where one is too large, some of its queries at a time.

    Of the places of K the first `filled[n]` are read for block n of queries.
    """
    rows, heads, tokens, _ = q.shape
    size, count = selection.q_block, selection.ids.shape[2]
    key_heads = heads if selection.ids.shape[1] == heads else k.shape[1]
    q_pos = positions(see, tokens, k.shape[2], q.device)[0].expand(rows, -1)
    most = LOGITS_PER_BLOCK * (1 if q.device.type == "cpu" else WIDER)
    far = None if selection.far is None else selection.far * selection.block
    width = max([1, *filled]) * selection.block
    each = rows * width * (heads * size + key_heads * (q.shape[3] + v.shape[3]))
    some = max(1, most // max(1, each))
    for first in range(0, count, some):
        blocks = slice(first, min(first + some, count))
        here = slice(first * size, min(blocks.stop * size, tokens))
        q_part, q_places = _fold(q[:, :, here], q_pos[:, here], blocks.stop - first, size)
        index, k_pos = _find(selection, blocks, max([1, *filled[blocks]]), key_heads, k)
        k_part, v_part = (read(x, index).flatten(0, 1) for x in (k, v))
        keys = turn_keys(k_part, k_pos, q_places, EVERYTHING, turns, size == 1, far)
        step = min(size, max(16, most // max(1, q_part.shape[0] * heads * k_part.shape[2])))
        length = min(size, here.stop - here.start)
        for start in range(0, length, step):  # more than one step only where there is one block
            queries = slice(here.start + start, min(here.start + start + step, here.stop)) if step < length else here
            own, places = q_part[:, :, start : start + step], q_places[..., start : start + step]
            weights, total = weigh(own, places, keys, logits, EVERYTHING, turns)
            yield Part(blocks, queries, weights, total, v_part, places, k_pos, far)


def _fold(q: Tensor, q_pos: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Rows and blocks as one axis: `[B * n, Hq, Q, D]` and `[B * n, 1, Q]`; the last block may be short."""
    missing = count * size - q.shape[2]
    if missing:
        q, q_pos = pad(q, (0, 0, 0, missing)), pad(q_pos, (0, missing), value=-1)
    q = torch.unflatten(q, 2, (count, size)).transpose(1, 2).flatten(0, 1)
    return q, q_pos.reshape(-1, 1, size)


def _find(
    selection: Selection, blocks: slice, chosen: int, key_heads: int, k: Tensor | Packed
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Where the keys of some blocks of queries lie, and their positions.

    Returns:
        Row, head and column of each, which together are `[B, n, H, L]`, and `[B * n, H or 1, L]`, int64, -1 for none.
    """
    ids = selection.ids[:, :, blocks, :chosen].transpose(1, 2).long()
    pages = ids if selection.pages is None else selection.pages[:, :, blocks, :chosen].transpose(1, 2).long()
    within = torch.arange(selection.block, device=ids.device)
    cols = (pages[..., None] * selection.block + within).flatten(3)
    k_pos = (ids[..., None] * selection.block + within).masked_fill(ids[..., None] < 0, -1).flatten(3)
    k_pos = k_pos.masked_fill(cols >= k.shape[2], -1)
    row = torch.arange(ids.shape[0], device=ids.device)[:, None, None, None]
    head = torch.arange(key_heads, device=ids.device)[:, None] // (key_heads // k.shape[1])
    return (row, head, cols.clamp(0, k.shape[2] - 1)), k_pos.flatten(0, 1)
