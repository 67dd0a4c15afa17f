"""One group of heads in one call: store the fresh tokens, choose what is read, read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .cache.kept import Kept
from .cache.pieces import Blocks, pieces
from .cache.recent import RecentStore, attend_both
from .cache.rows import View
from .cache.step import FEW, Step
from .cache.stores import device_store
from .context import Forward, Read
from .gradient import Stored
from .kernels import ops
from .kernels.wide import picked
from .plan import HeadGroup, Selector
from .route import goes_in_turn, leaves, reads_all, reads_at_once, selector_for
from .select.choose import all_from, choose, forced, forced_ahead, most_far, visible_to
from .select.scorers import Look
from .sight import above, floor_of, turns_of
from .turning import turn_keys, turn_queries

QUERIES = 16384
"""Queries of a prompt for which blocks are chosen at a time: bounds the memory of scores and lists."""


@dataclass(frozen=True)
class Call:
    """One group of heads of one layer in one call, all that does not change from token to token."""

    forward: Forward
    layer: int
    group: HeadGroup
    store: Any
    logits: ops.Logits


@dataclass(frozen=True)
class Among:
    """Where a group's query heads are among all of a layer.

    Args:
        heads: `[Hq']`, int32.
        out: gives `[B, Hq, T, Dv]`, of the layer.
    """

    heads: Tensor
    out: Callable[[], Tensor]


def attend_group(
    forward: Forward,
    layer: int,
    group: HeadGroup,
    stored: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: ops.Logits,
    among: Among | None = None,
) -> Tensor | None:
    """Append, attend, evict for one group of heads: `[B, Hq', T, D]`.

    With `among`, q has all heads of the layer, and None says that what comes of the group's is in its place.
    """
    step = forward.step.on(q.device)
    if among is not None and not leaves(forward, group.policy, step):
        q, among = picked(q, 1, among.heads), None
    if step.order is not None:
        q, k, v = (ops.take_tokens(x, step.order) for x in (q, k, v))
    policy = group.policy
    selector = selector_for(policy.decode if step.decodes else policy.prefill, step)
    in_turn = selector is not None and goes_in_turn(policy, selector, step)
    store = None if stored is None else stored[1]
    if store is None and (in_turn or policy.kv is not None):
        store = device_store(policy)  # for this call alone
    if store is not None and not step.decodes:
        store.kept.forget()
    call = Call(forward, layer, group, store, logits)
    cut_off = step.columns > 0 or in_turn  # some of what is read carries no gradient
    at_once = not in_turn or reads_at_once(forward, layer, policy, selector, step)
    if selector is None or (reads_all(selector, step) and at_once):
        out = _read_all(call, step, q, k, v, among)
    elif in_turn:
        out = _read_in_turn(call, selector, step, q, k, v)
    else:
        out = _read_chosen(call, selector, step, q, k, v)
        cut_off = cut_off or policy.kv is not None
    if out is None:
        return None
    if cut_off and torch.is_grad_enabled():
        out = Stored.apply(out, q, k, v)  # type: ignore[no-untyped-call]
    return out if step.restore is None else ops.take_tokens(out, step.restore)


def _read_all(call: Call, step: Step, q: Tensor, k: Tensor, v: Tensor, among: Among | None) -> Tensor | None:
    """Attention over all that is stored and visible; `among` as in `attend_group`."""
    store, retention = call.store, call.group.policy.retention
    if isinstance(store, RecentStore) and call.forward.tap is None:  # a tap is told of keys in one format
        return attend_both(store, q, k, v, call.logits, step)
    view = View(k, v, step.pos if step.ragged else None) if store is None else store.append(k, v, step)
    if call.group.policy.positions.at_read:
        assert isinstance(view.k, Tensor)
        q, view = turn_queries(call.forward, q, step), replace(view, k=turn_keys(call.forward, view.k, step))
    q_pos = step.pos if step.ragged or view.k_pos is not None else None
    window = retention.reach(not step.decodes)
    see = ops.Visibility(retention.sink, window, q_pos, view.k_pos)
    floor = floor_of(call.forward, retention, store, q.device)
    if floor is not None:
        see = above(see, floor, view, step)
    turns = turns_of(call.forward, call.layer, call.group.policy, step, floor)
    if among is not None:
        ops.attend_heads(q, view.k, view.v, call.logits, see, turns, None, among.heads, among.out())
        return None
    few = step.tokens == 1 and step.columns > 0
    out = (ops.attend_pages if few else ops.attend_blocks)(q, view.k, view.v, call.logits, see, turns)
    tap = call.forward.tap
    if tap is None:
        return out
    assert isinstance(view.k, Tensor) and isinstance(view.v, Tensor)
    return tap(Read(call.layer, call.group, step, q, view.k, view.v, call.logits, see, out))


def _read_chosen(call: Call, selector: Selector, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every block of queries chooses for itself, and nothing that it reads depends on the others."""
    store, turns = call.store, turns_of(call.forward, call.layer, call.group.policy, step, None)
    keys: Tensor | ops.Packed = k
    values: Tensor | ops.Packed = v
    if store is not None:
        store.write(k, v, step, turns)
        if step.columns or call.group.policy.kv is not None:
            keys, values = store.memory if step.decodes else store.whole(step.lengths_after, step.width)
    blocks = Blocks.of(step, 1 if step.decodes else selector.scorer.q_block)
    each = max(1, QUERIES // blocks.size)
    parts = []
    for first in range(0, blocks.number, each):
        last = min(blocks.number, first + each)
        pos = blocks.pos[:, first * blocks.size : last * blocks.size]
        asked = blocks.take(q, first, last)
        near, visible = forced_near(selector, step, pos, blocks.size, q.shape[0], first)
        look = _look(call, selector, asked, pos, blocks.size, keys, turns, near[0])
        ids = choose(selector, look, near)
        pages = store.locate(ids, selector.block, step) if store is not None and step.decodes else None
        read = ops.Selection(ids, selector.block, blocks.size, pages)
        note(call, selector, pos, read, near[1], visible)
        see = ops.Visibility(q_pos=pos)
        attend = ops.attend_pages if step.decodes else ops.attend_blocks
        parts.append(attend(asked, keys, values, call.logits, see, turns, read))
    return blocks.restore(parts[0] if len(parts) == 1 else torch.cat(parts, 2))


def _read_in_turn(call: Call, selector: Selector, step: Step, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Block of queries after block of queries: what one reads decides what the next may choose."""
    store, turns = call.store, turns_of(call.forward, call.layer, call.group.policy, step, None)
    size = 1 if step.decodes else selector.scorer.q_block
    out: Tensor | None = None
    distance, summary = call.group.policy.positions.distance, selector.scorer.summary
    reaches = distance is None or distance >= selector.local - 1  # what is local is never read from elsewhere
    for tokens, piece in step.once(("pieces", size), lambda: list(pieces(step, size))):
        asked, fresh_k, fresh_v = (_some(x, tokens) for x in (q, k, v))
        store.write(fresh_k, fresh_v, piece, turns)
        near, visible = forced_near(selector, piece, piece.pos, piece.tokens, q.shape[0])
        ids = _renew(call, selector, piece, asked, turns, near)
        far = most_far(selector, piece.tokens) if reaches else None
        pages = store.locate(ids, selector.block, piece)
        if pages is not None:
            ids = ids.expand_as(pages)  # every head has places of its own
        read = ops.Selection(ids, selector.block, piece.tokens, pages, far)
        note(call, selector, piece.pos, read, near[1], visible)
        keys, values = store.memory
        see = ops.Visibility(q_pos=piece.pos)
        if summary is not None and summary.weighs:
            part, mass = ops.attend_mass(asked, keys, values, call.logits, see, turns, read, selector.local)
            store.add_mass(ids, mass, selector.block)
        else:
            attend = ops.attend_pages if piece.tokens <= FEW else ops.attend_blocks
            part = attend(asked, keys, values, call.logits, see, turns, read)
        if piece.tokens == step.tokens and isinstance(tokens, slice):
            return part
        if out is None:
            out = v.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
        _put(out, tokens, piece, part)
    assert out is not None
    return out


def _renew(
    call: Call, selector: Selector, piece: Step, q: Tensor, turns: ops.Turns | None, near: tuple[Tensor, Tensor]
) -> Tensor:
    """What a block of queries reads: chosen now, or some decode steps ago with what would be forced by now."""
    kept: Kept = call.store.kept
    again = selector.refresh_every > 1 and call.forward.step.decodes
    if again and not kept.is_due(selector.refresh_every, piece.columns):
        return kept.ids
    if again:
        near = piece.once(("ahead", selector), lambda: forced_ahead(selector, piece.lengths))
    look = _look(call, selector, q, piece.pos, piece.tokens, call.store.memory[0], turns, near[0])
    ids = choose(selector, look, near)
    if again:
        kept.put(ids, piece.columns)
    return ids


def _look(
    call: Call,
    selector: Selector,
    q: Tensor,
    pos: Tensor,
    size: int,
    keys: Tensor | ops.Packed,
    turns: ops.Turns | None,
    low: Tensor,
) -> Look:
    summary = None if selector.scorer.summary is None else call.store.summaries
    return Look(q, pos, keys, summary, size, call.logits.scale, selector.share, turns, low)


def _some(x: Tensor, tokens: Tensor | slice) -> Tensor:
    return x[:, :, tokens] if isinstance(tokens, slice) else ops.take_tokens(x, tokens.expand(x.shape[0], -1))


def _put(out: Tensor, tokens: Tensor | slice, piece: Step, part: Tensor) -> None:
    """Put what a piece gave where its tokens are in the call."""
    if isinstance(tokens, slice):
        out[:, :, tokens] = part
        return
    index = tokens.expand(out.shape[0], -1)[:, None, :, None].expand_as(part)
    real = (piece.pos >= 0)[:, None, :, None]
    out.scatter_add_(2, index, part.masked_fill(~real, 0).to(out.dtype))


def forced_near(
    selector: Selector, step: Step, pos: Tensor, size: int, rows: int, first: int = 0
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """What is forced for the blocks of queries from the `first` on, and `[]`, how many blocks they could have seen.

    Args:
        selector: that forces.
        step: whose queries they are; what follows from it is found once for all layers.
        pos: `[B or 1, N * size]`, their positions.
        size: queries of a block.
        rows: of the batch.
        first: number of the first block in the step.
    """

    def make() -> tuple[tuple[Tensor, Tensor], Tensor]:
        near = forced(selector, pos, size)
        if selector.scorer.summary is None and step.tail is not None:
            near = all_from(selector, near, step.tail)
        return near, visible_to(near[1], rows)

    near, visible = step.once(("near", selector, size, rows, first), make)
    return near, visible


def note(call: Call, selector: Selector, pos: Tensor, read: ops.Selection, last: Tensor, visible: Tensor) -> None:
    """Count what is read, and tell whoever watches."""
    forward = call.forward
    if forward.cache is not None:
        if forward.step.decodes:
            forward.reads.append((read.ids, last, visible))
        else:  # too many to hold; none was chosen for queries to come
            forward.cache.ledger.count("prefill", read.ids, None, visible)
    if forward.watch is not None:
        forward.watch(call.layer, call.group, selector, pos, read)
