"""Random arguments of attention with a selection, and what they mean: a loop over queries and keys in Python floats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hf_longctx.kernels.ops import Logits, Selection, Turns, Visibility

from .scenes import Vector, lap_position, turned

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Scene:
    """Arguments of attention with a selection, in float64; `q` and `k` at lap positions where there are turns."""

    q: Tensor
    k: Tensor
    v: Tensor
    logits: Logits
    q_pos: Tensor
    turns: Turns | None
    selection: Selection

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.logits, Visibility(q_pos=self.q_pos), self.turns, self.selection

    @property
    def allowed(self) -> float:
        """Half an ulp for every term of the sums; angles are below 200."""
        terms = self.selection.ids.shape[-1] * self.selection.block + self.q.shape[3] + 400
        return terms * EPS * max(1.0, float(self.v.abs().max()))

    def seen(self, row: int, head: int, t: int) -> list[tuple[int, int, int]]:
        """Position, column, and place among the selected columns, of each key that a query sees."""
        ids, chosen = self.selection.ids, self.selection
        own = head * ids.shape[1] // self.q.shape[1]
        n, here = t // chosen.q_block, int(self.q_pos[row % len(self.q_pos), t])
        found = []
        for place, j in enumerate(ids[row, own, n].tolist()):
            page = j if chosen.pages is None else int(chosen.pages[row, own, n, place])
            for i in range(chosen.block if j >= 0 else 0):
                pos, column = j * chosen.block + i, page * chosen.block + i
                if pos <= here and column < self.k.shape[2]:
                    found.append((pos, column, place * chosen.block + i))
        return found

    def result(self, near: int = 0) -> tuple[Tensor, Tensor]:
        """What attention is defined to give, and the mass of each selected column."""
        rows, heads, tokens, _ = self.q.shape
        kv_heads, chosen = self.k.shape[1], self.selection
        out = torch.zeros(rows, heads, tokens, self.v.shape[3], dtype=torch.float64)
        mass = torch.zeros(rows, kv_heads, chosen.ids.shape[2], chosen.ids.shape[3] * chosen.block).double()
        for row in range(rows):
            for head in range(heads):
                mine = head // (heads // kv_heads)
                for t in range(tokens):
                    here, seen = int(self.q_pos[row % len(self.q_pos), t]), self.seen(row, head, t)
                    for weight, (pos, column, place) in zip(self._weights(row, head, t, seen), seen, strict=True):
                        out[row, head, t] += weight * self.v[row, mine, column]
                        if here - pos < near:
                            mass[row, mine, t // chosen.q_block, place] += weight
        return out, mass

    def _weights(self, row: int, head: int, t: int, seen: list[tuple[int, int, int]]) -> Vector:
        options, here = self.logits, int(self.q_pos[row % len(self.q_pos), t])
        mine = head // (self.q.shape[1] // self.k.shape[1])
        q = _at_start(self.q[row, head, t].tolist(), here, self.turns)
        logits = []
        for pos, column, _ in seen:
            distance = here - pos
            if self.turns is not None and self.turns.clamp is not None:
                distance = min(distance, self.turns.clamp)
            key = _at_start(self.k[row, mine, column].tolist(), pos, self.turns)
            x = options.scale * sum(a * b for a, b in zip(turned(q, distance, self.turns), key, strict=True))
            x = x if options.softcap is None else options.softcap * math.tanh(x / options.softcap)
            logits.append(x - (0.0 if options.slopes is None else float(options.slopes[head]) * distance))
        sinks = [] if options.sink_logits is None else [float(options.sink_logits[head])]
        top = max(logits + sinks, default=0.0)
        total = sum(math.exp(x - top) for x in logits + sinks)
        return [math.exp(x - top) / total for x in logits]


def _at_start(x: Vector, pos: int, turns: Turns | None) -> Vector:
    """Turned back from the lap position of `pos` to position 0."""
    return turned(x, -lap_position(pos, turns), turns)


@st.composite
def scenes(draw: st.DrawFn, shares: tuple[str, ...] = ("all", "kv_head", "q_head"), one: bool = False) -> Scene:
    """Rows of different lengths, blocks of queries with holes, blocks of keys in any page, the last of them cut."""
    rows, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 7]))
    block, q_block, dim = draw(st.integers(1, 5)), 1 if one else draw(st.integers(1, 5)), 2 * draw(st.integers(1, 3))
    count, blocks, heads = draw(st.integers(1, 3)), draw(st.integers(1, 6)), kv_heads * group
    tokens = count * q_block - draw(st.integers(0, q_block - 1))  # the last block may be short
    made = torch.Generator().manual_seed(draw(st.integers(0, 999)))

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    places = draw(st.sampled_from([1, rows]))
    q_pos = torch.randint(-1, blocks * block, (places, tokens), generator=made)
    sharing = {"all": 1, "kv_head": kv_heads, "q_head": heads}[draw(st.sampled_from(shares))]
    chosen = draw(st.integers(1, blocks))
    ids, pages = _selected(made, (rows, sharing, count), blocks, chosen)
    stored = blocks * block - draw(st.integers(0, block - 1))
    selection = Selection(ids, block, q_block, pages if draw(st.booleans()) else None)
    logits = Logits(
        dim**-0.5,
        draw(st.sampled_from([None, 1.5])),
        random(heads) if draw(st.booleans()) else None,
        random(heads).abs().float() if draw(st.booleans()) else None,
    )
    turns = None
    if draw(st.booleans()):
        clamp = draw(st.one_of(st.none(), st.integers(1, 9)))
        lap = (30 if clamp is None else clamp + 1) + draw(st.integers(0, 5))
        rotated = draw(st.integers(0, dim // 2))
        frequencies = torch.rand(rotated, generator=made) if rotated else None
        nowhere = torch.full_like(q_pos, -1000)
        turns = Turns(nowhere, lap, draw(st.integers(0, 4)), frequencies, draw(st.booleans()), clamp)
    q, k, v = random(rows, heads, tokens, dim), random(rows, kv_heads, stored, dim), random(rows, kv_heads, stored, 3)
    return Scene(q, k, v, logits, q_pos, turns, selection)


def _selected(made: torch.Generator, shape: tuple[int, ...], blocks: int, chosen: int) -> tuple[Tensor, Tensor]:
    """Some of the blocks, ascending, then -1; and a page for each."""
    ids = torch.full((*shape, chosen), -1, dtype=torch.int32)
    pages = ids.clone()
    for line, places in zip(ids.view(-1, chosen), pages.view(-1, chosen), strict=True):
        filled = int(torch.randint(0, chosen + 1, (), generator=made))
        line[:filled] = torch.randperm(blocks, generator=made)[:filled].sort().values
        places[:filled] = torch.randperm(blocks, generator=made)[:filled]
    return ids, pages
