"""Random arguments of the attention operations, and what they mean: a loop over queries and keys in Python floats."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from hf_longctx.kernels.ops import Logits, Turns, Visibility

Vector = list[float]


def turned(x: Vector, pos: int, turns: Turns | None) -> Vector:
    """x rotated to a position."""
    if turns is None or turns.inv_freq is None:
        return x
    out, half = list(x), len(turns.inv_freq)
    for i, frequency in enumerate(turns.inv_freq.tolist()):
        a, b = (2 * i, 2 * i + 1) if turns.interleaved else (i, i + half)
        cos, sin = math.cos(pos * frequency), math.sin(pos * frequency)
        out[a], out[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
    return out


def lap_position(pos: int, turns: Turns | None) -> int:
    """Where a token is rotated."""
    while turns is not None and pos >= turns.offset + turns.lap:
        pos -= turns.lap
    return pos


@dataclass(frozen=True)
class Scene:
    """Arguments before rotation: `q`, `k`, `v` in float64, positions of every row in full.

    `places` says which of them the operation is told: `all`, those of `queries` where columns are positions, or `none`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    logits: Logits
    see: Visibility
    turns: Turns | None
    places: str = "all"

    def arguments(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Logits, Visibility, Turns | None]:
        """What the operation is called with: at lap positions where there are turns."""
        q, k = self.q, self.k
        if self.turns is not None and self.turns.inv_freq is not None:
            q, k = self._at_laps(q, self.see.q_pos), self._at_laps(k, self.see.k_pos)
        queries, keys = (None if self.places == "none" else self.see.q_pos), self.see.k_pos
        see = replace(self.see, q_pos=queries, k_pos=keys if self.places == "all" else None)
        return q.to(dtype), k.to(dtype), self.v.to(dtype), self.logits, see, self.turns

    def _at_laps(self, x: Tensor, pos: Tensor | None) -> Tensor:
        assert pos is not None
        out = x.clone()
        for row, places in enumerate(pos.tolist()):
            for head in range(x.shape[1]):
                for t, place in enumerate(places):
                    at_lap = turned(x[row, head, t].tolist(), lap_position(place, self.turns), self.turns)
                    out[row, head, t] = torch.tensor(at_lap, dtype=x.dtype)
        return out

    def result(self) -> Tensor:
        """What the operation is defined to give, in float64."""
        assert self.see.q_pos is not None
        out = torch.zeros(*self.q.shape[:3], self.v.shape[-1], dtype=torch.float64)
        for row, places in enumerate(self.see.q_pos.tolist()):
            for head in range(self.q.shape[1]):
                for t in range(len(places)):
                    out[row, head, t] = self._query(row, head, t)
        return out

    def _query(self, row: int, head: int, t: int) -> Tensor:
        see, turns, options = self.see, self.turns, self.logits
        assert see.q_pos is not None
        assert see.k_pos is not None
        mine = head // (self.q.shape[1] // self.k.shape[1])
        q, here = self.q[row, head, t].tolist(), int(see.q_pos[row, t])
        logits, values = [], []
        for j, there in enumerate(see.k_pos[row].tolist()):
            if not 0 <= there <= here or not (there < see.sink or see.window is None or here - there < see.window):
                continue
            place = here
            if turns is not None and turns.clamp is not None:
                place = there + min(here - there, turns.clamp)
            elif turns is not None and there < see.sink:
                place = int(turns.sink_pos[row, t])
            a, b = turned(q, place, turns), turned(self.k[row, mine, j].tolist(), there, turns)
            x = options.scale * sum(p * r for p, r in zip(a, b, strict=True))
            x = x if options.softcap is None else options.softcap * math.tanh(x / options.softcap)
            x += 0.0 if options.slopes is None else float(options.slopes[head]) * (there - place)
            logits.append(x)
            values.append(self.v[row, mine, j])
        if not logits:
            return torch.zeros(self.v.shape[-1], dtype=torch.float64)
        sinks = [] if options.sink_logits is None else [float(options.sink_logits[head])]
        top = max(logits + sinks)
        total = sum(math.exp(x - top) for x in logits + sinks)
        return sum((math.exp(x - top) / total * v for x, v in zip(logits, values, strict=True)), torch.zeros(()))


@st.composite
def scenes(draw: st.DrawFn, plain: bool = False, one: bool = False, most: int = 40) -> Scene:
    """A call on a store as `cache/store.py` hands it out; `plain`: only scaled products; `one`: queries of one column.

    Rows hold different numbers of tokens, and some of the call's columns are padding.
    """
    rows, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 4, 7]))
    tokens, columns = 1 if one else draw(st.integers(1, most)), draw(st.integers(0, 30))
    sink = draw(st.integers(0, 4))
    window = draw(st.one_of(st.none(), st.integers(1, 20)))
    before = [draw(st.integers(0, columns)) for _ in range(rows)]
    count = [draw(st.integers(0, tokens)) for _ in range(rows)]
    places = draw(st.sampled_from(["all", "queries", "none"]))
    if places == "none":
        before, count = [columns] * rows, [tokens] * rows
    if places != "all":
        k_pos = [list(range(columns + tokens))] * rows
    else:
        k_pos = [_columns(b, c, columns, tokens, sink, window) for b, c in zip(before, count, strict=True)]
    q_pos = [[b + t if t < c else -1 for t in range(tokens)] for b, c in zip(before, count, strict=True)]
    made = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    dim, heads = 2 * draw(st.integers(1, 5)), kv_heads * group

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    q, k = random(rows, heads, tokens, dim), random(rows, kv_heads, len(k_pos[0]), dim)
    v = random(rows, kv_heads, len(k_pos[0]), draw(st.integers(1, 9)))
    see = Visibility(sink, window, torch.tensor(q_pos), torch.tensor(k_pos))
    logits = Logits(draw(st.sampled_from([1.0, dim**-0.5])))
    turns = None
    if not plain:
        logits = Logits(
            logits.scale,
            draw(st.sampled_from([None, 1.5])),
            random(heads) if draw(st.booleans()) else None,
            random(heads).abs().float() if draw(st.booleans()) else None,
        )
        if draw(st.booleans()):
            turns = _turns(draw, made, see, dim)
    return Scene(q, k, v, logits, see, turns, places)


def _columns(before: int, count: int, columns: int, tokens: int, sink: int, window: int | None) -> list[int]:
    """Positions in a row's columns: sinks, then what is left of the window, right-aligned, then the call's own."""
    sinks = [p if p < before + count else -1 for p in range(min(sink, columns + tokens))]
    width = max(0, columns - sink) if window is None else min(window, max(0, columns - sink))
    rest = [p if p >= sink else -1 for p in range(before - width, before)]
    own = [before + t if t < count and before + t >= sink else -1 for t in range(tokens)]
    return [*sinks, *rest, *own]


def _turns(draw: st.DrawFn, made: torch.Generator, see: Visibility, dim: int) -> Turns:
    assert see.q_pos is not None
    clamp = draw(st.integers(1, 12)) if see.window is None or draw(st.booleans()) else None
    lap = (see.window or 0 if clamp is None else clamp + 1) + draw(st.integers(0, 5))
    offset = see.sink + draw(st.integers(0, 3))
    sink_pos = torch.randint(0, 30, see.q_pos.shape, generator=made)
    rotated = draw(st.integers(0, dim // 2))
    inv_freq = torch.rand(rotated, generator=made) if rotated else None
    return Turns(sink_pos, lap, offset, inv_freq, draw(st.booleans()), clamp)


def shuffled(scene: Scene, seed: int) -> Scene:
    """The same with its columns beyond the sinks in another order, as a ring holds them."""
    assert scene.see.k_pos is not None
    first = min(scene.see.sink, scene.k.shape[2])
    order = torch.randperm(scene.k.shape[2] - first, generator=torch.Generator().manual_seed(seed)) + first
    order = torch.cat((torch.arange(first), order))
    see = replace(scene.see, k_pos=scene.see.k_pos[:, order])
    return replace(scene, k=scene.k[:, :, order], v=scene.v[:, :, order], see=see, places="all")
