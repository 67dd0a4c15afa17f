"""Rows of random vectors as lists, and a store that is driven beside them; nothing here knows of slots."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import hf_longctx as lc
from hf_longctx.cache.rows import decoded
from hf_longctx.cache.step import Step
from hf_longctx.kernels import ops

CPU = torch.device("cpu")
HEADS, DIM = 2, 4


class Text:
    """A cache of one layer with one group, and every row's keys and values in a list, as they should be read."""

    def __init__(self, policy: lc.HeadPolicy, rows: int, seed: int = 0) -> None:
        heads = tuple(range(HEADS))
        self.cache = lc.LongContextCache(lc.Plan("test", (lc.LayerPlan((lc.HeadGroup(heads, policy),)),)))
        self.policy, self.reals = policy, list[Tensor]()
        self.keys: list[list[Tensor]] = [[] for _ in range(rows)]
        self.values: list[list[Tensor]] = [[] for _ in range(rows)]
        self.random = torch.Generator().manual_seed(seed)

    @property
    def store(self) -> Any:
        return self.cache.stacks[0].stores[0][1]

    def read(self, x: Tensor) -> Tensor:
        """What a store gives back of fresh values."""
        return x if self.policy.kv is None else ops.decode_kv(ops.encode_kv(x, self.policy.kv.bits))

    def draw(self, real: Tensor) -> tuple[Step, Tensor, Tensor]:
        """The step of a call with these real tokens, its keys and values, each row's real tokens first."""
        self.reals.append(real)
        padded = not all(bool(r.all()) for r in self.reals)
        mask = torch.cat(self.reals, 1).long() if padded else None
        step = self.cache.begin(real.shape[1], real.shape[0], CPU, mask)
        k, v = (torch.randn(len(real), HEADS, real.shape[1], DIM, generator=self.random) for _ in range(2))
        read_k, read_v = self.read(k), self.read(v)
        for row, columns in enumerate(real.tolist()):
            for column in (column for column, is_real in enumerate(columns) if is_real):
                self.keys[row].append(read_k[row, :, column])
                self.values[row].append(read_v[row, :, column])
        if step.order is not None:
            k, v = ops.take_tokens(k, step.order), ops.take_tokens(v, step.order)
        return step, k, v

    def pick(self, rows: list[int]) -> None:
        """Replace the batch rows."""
        self.cache.reorder_cache(torch.tensor(rows))
        self.keys, self.values = ([list(lists[row]) for row in rows] for lists in (self.keys, self.values))
        self.reals = [real[rows] for real in self.reals]

    def crop(self, count: int) -> None:
        """Take tokens back."""
        self.cache.crop(-count)
        for lists in (self.keys, self.values):
            lists[:] = [row[: len(row) - count] for row in lists]
        whole = torch.cat(self.reals, 1)
        self.reals = [whole[:, : whole.shape[1] - count]]

    def solid(self) -> int:
        """Columns since the last padding in any row."""
        whole = torch.cat(self.reals, 1).all(0).tolist()
        return whole[::-1].index(False) if False in whole else len(whole)


def assert_reads(text: Text, view: Any, step: Step) -> None:
    """Every query of the call finds every key and value that it sees, bit for bit."""
    sink, window = text.policy.retention.sink, text.policy.retention.reach(not step.decodes)
    held_k, held_v = decoded(view.k), decoded(view.v)
    columns = torch.arange(view.k.shape[2])[None] if view.k_pos is None else view.k_pos
    columns = columns.expand(len(text.keys), -1).tolist()
    floor = text.store.floor
    for row, queries in enumerate(step.pos.expand(len(text.keys), -1).tolist()):
        at = {place: column for column, place in enumerate(columns[row]) if place >= 0}
        oldest = 0 if floor is None else int(floor.expand(len(text.keys), 1)[row])
        seen: set[int] = set()
        for query in (q for q in queries if q >= 0):
            near = range(max(0, oldest, 0 if window is None else query - window + 1), query + 1)
            seen |= {*near, *range(min(sink, query + 1))}
        for pos in seen:
            assert torch.equal(held_k[row, :, at[pos]], text.keys[row][pos])
            assert torch.equal(held_v[row, :, at[pos]], text.values[row][pos])


@st.composite
def reals(draw: st.DrawFn, rows: int, padded: bool, most: int = 20) -> Tensor:
    """`[rows, T]`: which columns of a call are real; holes anywhere if `padded`."""
    tokens = draw(st.sampled_from([1, 1, 2, 3, 7, 19, 40, 90]).filter(lambda t: t <= most))
    if not padded:
        return torch.ones(rows, tokens, dtype=torch.bool)
    flags = st.lists(st.booleans(), min_size=tokens, max_size=tokens)
    return torch.tensor([draw(flags) for _ in range(rows)])


def change(text: Text, data: st.DataObject, crops: bool = True) -> None:
    """Perhaps reorder the rows, or take tokens back."""
    kind = data.draw(st.sampled_from(["nothing", "nothing", "pick", "crop"]))
    rows = len(text.keys)
    if kind == "pick":
        text.pick(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=3)))
    elif kind == "crop" and crops:
        text.crop(data.draw(st.integers(0, min(90, text.solid()))))
