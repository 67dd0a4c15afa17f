"""Attention over selected blocks: by definition, with every kind of selection, position and logit; mass; gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_longctx.kernels import ops
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.ops import Logits, Packed, Selection, Turns, Visibility
from hf_longctx.kernels.reference import selected

from .test_blocks_memory import Largest

MANY = settings(deadline=None, max_examples=60)
EPS = torch.finfo(torch.float64).eps
Vector = list[float]


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

    def _turned(self, x: Vector, delta: int) -> Vector:
        if self.turns is None or self.turns.inv_freq is None:
            return x
        out, half = list(x), len(self.turns.inv_freq)
        for i, frequency in enumerate(self.turns.inv_freq.tolist()):
            a, b = (2 * i, 2 * i + 1) if self.turns.interleaved else (i, i + half)
            cos, sin = math.cos(delta * frequency), math.sin(delta * frequency)
            out[a], out[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
        return out

    def _at_start(self, x: Vector, pos: int) -> Vector:
        """Turned back from the lap position of `pos` to position 0."""
        here = pos
        while self.turns is not None and here >= self.turns.offset + self.turns.lap:
            here -= self.turns.lap
        return self._turned(x, -here)

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
        q = self._at_start(self.q[row, head, t].tolist(), here)
        logits = []
        for pos, column, _ in seen:
            distance = here - pos
            if self.turns is not None and self.turns.clamp is not None:
                distance = min(distance, self.turns.clamp)
            key = self._at_start(self.k[row, mine, column].tolist(), pos)
            x = options.scale * sum(a * b for a, b in zip(self._turned(q, distance), key, strict=True))
            x = x if options.softcap is None else options.softcap * math.tanh(x / options.softcap)
            logits.append(x - (0.0 if options.slopes is None else float(options.slopes[head]) * distance))
        sinks = [] if options.sink_logits is None else [float(options.sink_logits[head])]
        top = max(logits + sinks, default=0.0)
        total = sum(math.exp(x - top) for x in logits + sinks)
        return [math.exp(x - top) / total for x in logits]


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


@pytest.mark.parametrize("op", [ops.attend_blocks, ops.attend_pages])
@MANY
@given(scene=scenes())
def test_definition(op: Any, scene: Scene) -> None:
    torch.testing.assert_close(op(*scene.arguments), scene.result()[0], atol=scene.allowed, rtol=0)


@MANY
@given(scenes(one=True))
def test_definition_of_decoding(scene: Scene) -> None:
    got = ops.attend_pages(*scene.arguments)
    torch.testing.assert_close(got, scene.result()[0], atol=scene.allowed, rtol=0)


@MANY
@given(scenes(shares=("all", "kv_head")), st.integers(1, 12))
def test_mass(scene: Scene, near: int) -> None:
    out, mass = ops.attend_mass(*scene.arguments, near)
    expected, expected_mass = scene.result(near)
    assert mass.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=scene.allowed, rtol=0)
    torch.testing.assert_close(mass.double(), expected_mass, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=30)
@given(scenes(shares=("all", "kv_head")), st.sampled_from([1, 500]))
def test_parts_are_the_whole(scene: Scene, budget: int) -> None:
    whole = ops.attend_mass(*scene.arguments, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selected, "LOGITS_PER_BLOCK", budget)
        parts = ops.attend_mass(*scene.arguments, 5)
    for mine, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(mine, other, atol=max(scene.allowed, 1e-6 if mine is parts[1] else 0.0), rtol=0)


def test_one_large_block_of_queries_is_read_in_parts() -> None:
    """More queries in a block than fit at a time, and a short block after it."""
    made = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, 75, 4, generator=made, dtype=torch.float64) for h in (4, 2))
    q_pos = torch.arange(75)[None]
    turns = Turns(q_pos, 20, 2, torch.rand(2, generator=made), clamp=15)
    everything = Selection(torch.arange(10, dtype=torch.int32).expand(2, 2, 2, 10), 8, 40)
    arguments = (q, k, k, Logits(0.5), Visibility(), turns)
    expected, mass = ops.attend_mass(*arguments, everything, 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selected, "LOGITS_PER_BLOCK", 1)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                out, parts = ops.attend_mass(*arguments, everything, 9)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(parts, mass)
    torch.testing.assert_close(ops.attend_blocks(*arguments), expected)


@settings(deadline=None, max_examples=40)
@given(scenes(), st.sampled_from([1, 8]))
def test_everything_selected_is_dense(scene: Scene, q_block: int) -> None:
    rows, heads, tokens, _ = scene.q.shape
    stored, block = scene.k.shape[2], scene.selection.block
    q_pos = torch.arange(stored - tokens, stored)[None].clamp(min=-1)
    blocks = torch.arange(-(-stored // block), dtype=torch.int32)
    everything = Selection(blocks.expand(rows, scene.selection.ids.shape[1], -(-tokens // q_block), -1), block, q_block)
    turns = scene.turns and replace(scene.turns, sink_pos=q_pos, lap=scene.turns.lap + 30)
    see = Visibility(q_pos=q_pos, k_pos=torch.arange(stored)[None])
    dense = ops.attend_pages(*scene.arguments[:4], see, turns)
    got = ops.attend_blocks(*scene.arguments[:4], see, turns, everything)
    torch.testing.assert_close(got, dense, atol=2 * scene.allowed, rtol=0)


@settings(deadline=None, max_examples=30)
@given(scenes(), st.sampled_from([4, 8]))
def test_packed_keys_and_values_are_those_that_were_stored(scene: Scene, bits: int) -> None:
    k, v = ops.encode_kv(scene.k, bits), ops.encode_kv(torch.cat((scene.v, scene.v[..., :1]), -1), bits)
    stored = replace(scene, k=ops.decode_kv(k), v=ops.decode_kv(v))
    expected = ops.attend_blocks(*stored.arguments)
    got = ops.attend_blocks(scene.q, k, v, *scene.arguments[3:])
    assert torch.equal(got, expected)


@settings(deadline=None, max_examples=25)
@given(scenes())
def test_gradients(scene: Scene) -> None:
    leaves = [x.requires_grad_() for x in (scene.q, scene.k, scene.v)]
    if scene.logits.sink_logits is not None:
        leaves.append(scene.logits.sink_logits.clone().requires_grad_())

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return ops.attend_blocks(q, k, v, replace(scene.logits, sink_logits=sinks), *scene.arguments[4:])

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_of_the_dtype(dtype: torch.dtype) -> None:
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 64, 16, generator=made).to(dtype) for h in (8, 2, 2))
    ids = torch.tensor([0, 2, 5, -1], dtype=torch.int32).expand(2, 2, 4, 4)
    turns = Turns(torch.arange(64)[None], 20, 0, torch.rand(8, generator=made), clamp=12)
    rest = (Logits(0.25), Visibility(), turns, Selection(ids, 8, 16))
    got, exact = ops.attend_blocks(q, k, v, *rest), ops.attend_blocks(q.double(), k.double(), v.double(), *rest)
    assert got.dtype == dtype
    ulp = torch.finfo(dtype).eps / 2 * exact.abs() + 200 * torch.finfo(torch.float32).eps
    assert ((got.double() - exact).abs() <= ulp).all()


def test_nothing_selected_gives_zeros() -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 20, 8)
    none = Selection(torch.full((2, 1, 3, 2), -1, dtype=torch.int32), 4, 2)
    out, mass = ops.attend_mass(q, k, k, Logits(1.0), Visibility(), None, none, 4)
    assert not out.any()
    assert not mass.any()
    assert out.shape == q.shape
    assert mass.shape == (2, 2, 3, 8)


def test_what_is_not_selected_is_not_read() -> None:
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 20, 8)
    ids = torch.tensor([1, 4, -1], dtype=torch.int32).expand(1, 1, 3, 3)
    poisoned = torch.full_like(k, torch.nan)
    for j in (1, 4):
        poisoned[:, :, 4 * j : 4 * j + 4] = k[:, :, 4 * j : 4 * j + 4]
    rest = (Logits(1.0), Visibility(), None, Selection(ids, 4, 2))
    assert torch.equal(ops.attend_blocks(q, poisoned, poisoned, *rest), ops.attend_blocks(q, k, k, *rest))


def test_the_torch_backend_says_that_it_cannot() -> None:
    x = torch.randn(1, 2, 3, 4)
    selection = Selection(torch.zeros(1, 1, 3, 1, dtype=torch.int32), 4, 1)
    with use_backend("torch"), pytest.raises(NotImplementedError, match="torch: cannot read selected blocks"):
        ops.attend_pages(x, x, x, Logits(1.0), Visibility(), None, selection)


@pytest.mark.parametrize("packed", [False, True])
def test_memory_is_that_of_the_selected_blocks(packed: bool) -> None:
    def run(tokens: int) -> int:
        q, k = torch.randn(1, 2, tokens, 4), torch.randn(1, 1, tokens, 4)
        store: Tensor | Packed = ops.encode_kv(k, 8) if packed else k
        ids = torch.tensor([0, 3, 7], dtype=torch.int32).expand(1, 1, tokens // 32, 3)
        with torch.no_grad(), Largest() as seen:
            ops.attend_blocks(q, store, store, Logits(0.5), Visibility(), None, Selection(ids, 16, 32))
        return seen.elements

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selected, "LOGITS_PER_BLOCK", 1 << 12)
        small, large = run(4096), run(8192)
    assert small == 4096 * 2 * 4  # the output: no logits and no copy of the keys are larger
    assert large == 2 * small
