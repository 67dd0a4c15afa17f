"""Tokens of few bits, and beside them the newest ones as the model made them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..kernels import dispatch, ops
from ..plan import HeadPolicy
from .retention import SinkWindow
from .rows import View
from .step import Step
from .store import Store

_NEAR = "near."


class RecentStore(Store):
    """A store of a lossy format whose last tokens a second one holds, too.

    Attributes:
        near: the last tokens, going round.
    """

    def __init__(self, policy: HeadPolicy) -> None:
        super().__init__(policy)
        assert policy.kv is not None
        self.near = Store(replace(policy, retention=SinkWindow(0, policy.kv.recent), kv=None))

    @property
    def kv_bytes(self) -> int:
        """Bytes of both."""
        return super().kv_bytes + self.near.kv_bytes

    def bytes_at(self, tokens: int, dim: int, itemsize: int) -> tuple[int, int]:
        """Of both; arguments as `Store.bytes_at`."""
        return super().bytes_at(tokens, dim, itemsize)[0] + self.near.bytes_at(tokens, dim, itemsize)[0], 0

    def append(self, k: Tensor, v: Tensor, step: Step) -> View:
        """Store the call's tokens in both, and return what the lossy one has; arguments as `Store.append`."""
        return self.append_both(k, v, step)[0]

    def append_both(self, k: Tensor, v: Tensor, step: Step) -> tuple[View, View]:
        """Store the call's tokens in both: what each then has for its queries; arguments as `append`."""
        return super().append(k, v, step), self.near.append(k, v, step)

    def write(self, k: Tensor, v: Tensor, step: Step, turns: ops.Turns | None = None) -> None:
        """Store the call's tokens in both; arguments as `Store.write`."""
        super().write(k, v, step, turns)
        self.near.write(k, v, step)

    def prepare(self, step: Step) -> None:
        """Let nothing move in either."""
        super().prepare(step)
        self.near.prepare(step)

    def buffers(self) -> list[Any]:
        """What both hold on their device."""
        return super().buffers() + self.near.buffers()

    def crop(self, tokens: int, columns: int) -> None:
        """Check that the last `tokens` of `columns` columns can be taken back (ValueError)."""
        self.near.crop(tokens, columns)

    def record(self) -> None:
        """Hold more of the last tokens, so that `crop` can take some back."""
        self.near.record()

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]` in both."""
        super().map_rows(pick)
        self.near.map_rows(pick)

    def state(self, columns: int, lengths: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers of both; arguments as `Store.state`."""
        tensors, values = super().state(columns, lengths)
        more, said = self.near.state(columns, lengths)
        return (
            {**tensors, **{_NEAR + name: x for name, x in more.items()}},
            {**values, **{_NEAR + name: x for name, x in said.items()}},
        )

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Become what `state` told of; an empty store only."""
        super().restore(tensors, values)
        self.near.restore(_under(tensors), _under(values))


def attend_both(store: RecentStore, q: Tensor, k: Tensor, v: Tensor, logits: ops.Logits, step: Step) -> Tensor:
    """Store the call's tokens, and read all: `[B, Hq, T, Dv]`.

    Args:
        store: of the group of heads.
        q: `[B, Hq, T, D]`.
        k: `[B, Hkv, T, D]`.
        v: `[B, Hkv, T, Dv]`.
        logits: from products to logits.
        step: the call.
    """
    recent = store.near.retention.window
    assert recent is not None
    if step.tokens == 1 and step.columns and step.decodes and q.is_cuda and dispatch.wanted() in (None, "compiled"):
        return _step(store, q, k, v, logits, step, recent)
    far, near = store.append_both(k, v, step)
    in_order = not step.ragged and step.tokens > 1 and far.k.shape[2] == step.end
    see = ops.Visibility(q_pos=None if in_order else step.pos, k_pos=far.k_pos)
    assert isinstance(near.k, torch.Tensor)
    assert isinstance(near.v, torch.Tensor)
    return ops.attend_recent(q, far.k, far.v, near.k, near.v, logits, see, near.k_pos, recent)


def _step(store: RecentStore, q: Tensor, k: Tensor, v: Tensor, logits: ops.Logits, step: Step, recent: int) -> Tensor:
    """As `attend_both`, of one token a row after others: one operation, which is one launch on a GPU."""
    _, far = store.place(k, step)
    place, near = store.near.place(k, step)
    assert place.ring is not None
    see, columns = ops.Visibility(q_pos=step.pos), (far.k.shape[2], near.k.shape[2])
    near_k, near_v = store.near.memory
    assert isinstance(near_k, Tensor) and isinstance(near_v, Tensor)
    stores = (*store.memory, near_k, near_v)
    return ops.step_recent(q, k, v, *stores, place.ring, logits, see, near.k_pos, recent, *columns)


def _under(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(_NEAR): x for name, x in found.items() if name.startswith(_NEAR)}
