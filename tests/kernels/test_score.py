"""Scores of blocks: by definition; the bound is a bound; antidiagonals of cut blocks, ragged rows and packed keys."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_longctx.kernels import ops
from hf_longctx.kernels.reference import score

from .test_blocks_memory import Largest

MANY = settings(max_examples=60)
EPS = torch.finfo(torch.float64).eps


def reduced(per_head: list[float], mean: bool) -> float:
    return sum(per_head) / len(per_head) if mean else max(per_head)


@st.composite
def summaries(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, str]:
    """Queries, bounds or vectors (some bounds of no key), sub-blocks of a block, who shares."""
    rows, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 4, 7]))
    count, entries, dim, subs = (draw(st.integers(1, n)) for n in (3, 7, 5, 3))
    made = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    q = torch.randn(rows, kv_heads * group, count, dim, generator=made, dtype=torch.float64)
    q[..., draw(st.integers(0, dim - 1))] = 0.0
    summary = torch.randn(rows, kv_heads, entries, draw(st.sampled_from([1, 2])), dim, generator=made).double()
    if summary.shape[3] == 2:
        summary = torch.stack((summary.amin(3), summary.amax(3)), 3)
        for row in range(rows):
            summary[row, :, entries - draw(st.integers(0, entries)) :] = torch.tensor([[math.inf], [-math.inf]])
    return q, summary, subs, draw(st.sampled_from(["kv_head", "q_head", "all"]))


def page_score(q: list[float], vectors: list[list[float]]) -> float:
    """Of one sub-block for one query."""
    if len(vectors) == 1:
        return sum(a * b for a, b in zip(q, vectors[0], strict=True))
    if vectors[0][0] > vectors[1][0]:
        return -math.inf
    return sum(max(a * low, a * high) for a, low, high in zip(q, *vectors, strict=True))


@MANY
@given(summaries())
def test_pages(arguments: tuple[Tensor, Tensor, int, str]) -> None:
    q, summary, subs, share = arguments
    (rows, heads, count, _), kv_heads, entries = q.shape, summary.shape[1], summary.shape[2]
    group, blocks = heads // kv_heads, -(-entries // subs)
    sharing = {
        "q_head": [[h] for h in range(heads)],
        "kv_head": [[*range(g * group, (g + 1) * group)] for g in range(kv_heads)],
        "all": [[*range(heads)]],
    }[share]
    got = ops.score_pages(q, summary, subs, share)
    assert got.shape == (rows, len(sharing), count, blocks)
    for row in range(rows):
        for s, sharers in enumerate(sharing):
            for n in range(count):
                for m in range(blocks):
                    per_head = [
                        max(
                            page_score(q[row, h, n].tolist(), summary[row, h // group, e].tolist())
                            for e in range(m * subs, min((m + 1) * subs, entries))
                        )
                        for h in sharers
                    ]
                    expected = reduced(per_head, mean=summary.shape[3] == 1)
                    assert float(got[row, s, n, m]) == pytest.approx(expected, abs=100 * EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", ["kv_head", "q_head", "all"])
def test_the_bound_is_a_bound(dtype: torch.dtype, share: str) -> None:
    q, k = torch.randn(2, 8, 3, 16).to(dtype), torch.randn(2, 2, 12 * 4, 16).to(dtype)
    pages = k.view(2, 2, 12, 4, 16)
    scores = ops.score_pages(q, torch.stack((pages.amin(3), pages.amax(3)), 3), 3, share)
    assert scores.dtype == torch.float32
    products = q.view(2, 2, 4, 3, 16).float() @ k.float().transpose(2, 3)[:, :, None]
    best = products.view(2, 2, 4, 3, 4, 12).amax(-1)
    best = {"kv_head": best.amax(2), "q_head": best.flatten(1, 2), "all": best.flatten(1, 2).amax(1, True)}[share]
    assert (scores >= best - 1e-5).all()


@dataclass(frozen=True)
class Tiles:
    """Arguments of `score_antidiagonal`."""

    q: Tensor
    k: Tensor
    q_pos: Tensor
    block: int
    stride: int
    scale: float
    causal: bool
    rounded: str = ""

    def result(self) -> Tensor:
        """What the operation is defined to give: a loop over blocks, tiles and antidiagonals."""
        rows, heads, stored = self.q.shape[0], self.q.shape[1], self.k.shape[2]
        count = self.q.shape[2] // self.block
        out = torch.zeros(rows, heads, count, -(-stored // self.block), dtype=torch.float64)
        for row in range(rows):
            q_pos = self.q_pos[row % len(self.q_pos)].tolist()
            last = max(q_pos) if self.causal else stored - 1
            for n in range(count):
                mine = {q_pos[i]: i for i in range(n * self.block, (n + 1) * self.block) if q_pos[i] >= 0}
                for tile in {p // self.stride for p in mine}:
                    for head in range(heads):
                        self._add(out[row, head, n], row, head, tile, mine, last)
        return out

    def _add(self, out: Tensor, row: int, head: int, tile: int, mine: dict[int, int], last: int) -> None:
        stride, stored = self.stride, self.k.shape[2]
        kv_head = head // (self.q.shape[1] // self.k.shape[1])
        logits = []
        queries = [tile * stride + stride - 1 - j for j in range(stride)]
        asked = self._tile({p: self.q[row, head, mine[p]] for p in queries if p in mine})
        for c in range(tile + 1 if self.causal else -(-stored // stride)):
            there = range(c * stride, min((c + 1) * stride, last + 1, stored))
            keys = self._tile({y: self.k[row, kv_head, y] for y in there})
            pairs = [(p, c * stride + j) for j, p in enumerate(queries) if p in asked and c * stride + j in keys]
            logits.append(self.scale / stride * sum(float(asked[p] @ keys[y]) for p, y in pairs))
        total = sum(math.exp(x - max(logits)) for x in logits)
        for c, x in enumerate(logits):
            out[c * stride // self.block] += math.exp(x - max(logits)) / total

    def _tile(self, tokens: dict[int, Tensor]) -> dict[int, Tensor]:
        """Each channel, over a part of the tile's largest, as the nearest number of 8 bits."""
        largest = np.float32(max((float(x.abs().amax()) for x in tokens.values()), default=0.0))
        if not self.rounded or not largest:
            return tokens
        nearest, most = (eight, np.float32(448)) if self.rounded == "fp8" else (round, np.float32(127))
        part, whole = most / largest, float(largest / most)
        rounded = {y: [nearest(float(np.float32(c) * part)) * whole for c in x] for y, x in tokens.items()}
        return {y: torch.tensor(x, dtype=torch.float64) for y, x in rounded.items()}


def eight(x: float) -> float:
    """The nearest e4m3, of two the even one: multiples of an eighth of the power of two below, and of 2^-9 at least."""
    unit = 2.0 ** max(math.floor(math.log2(abs(x))) - 3, -9) if x else 1.0
    return round(float(x) / unit) * unit


@st.composite
def tiles(draw: st.DrawFn) -> Tiles:
    """Rows of different lengths, and calls that start and end anywhere; each block's tokens stand first."""
    rows, kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.sampled_from([1, 4]))
    stride = draw(st.integers(1, 4))
    block = stride * draw(st.integers(1, 3))
    shared = draw(st.booleans())  # one row of positions for all
    ends = [draw(st.integers(0, 4 * block)) for _ in range(1 if shared else rows)]
    starts = [draw(st.integers(max(0, end - 2 * block), end)) for end in ends]
    stored = max(1, *ends) + draw(st.integers(0, 5))
    count = max(-(-e // block) - s // block for s, e in zip(starts, ends, strict=True)) or 1
    q_pos = []
    for start, end in zip(starts, ends, strict=True):
        line: list[int] = []
        for n in range(count):
            low = (start // block + n) * block
            own = [p for p in range(low, low + block) if start <= p < end]
            line += own + [-1] * (block - len(own))
        q_pos.append(line)
    made = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    q = torch.randn(rows, kv_heads * group, count * block, 3, generator=made, dtype=torch.float64)
    k = torch.randn(rows, kv_heads, stored, 3, generator=made, dtype=torch.float64)
    scale, causal = draw(st.sampled_from([0.5, 3.0])), draw(st.booleans())
    rounded = draw(st.sampled_from(["", "fp8", "int8"]))
    return Tiles(q.float().double(), k.float().double(), torch.tensor(q_pos), block, stride, scale, causal, rounded)


def antidiagonal(t: Tiles, q: Tensor, k: Tensor | ops.Packed) -> Tensor:
    return ops.score_antidiagonal(q, k, t.q_pos, t.block, t.stride, t.scale, t.causal, t.rounded)


@pytest.mark.parametrize("budget", [score.LOGITS_PER_BLOCK, 1])
@MANY
@given(case=tiles())
def test_antidiagonals(budget: int, case: Tiles) -> None:
    q, k = case.q.clone(), case.k.clone()
    q[(case.q_pos < 0)[:, None].expand(q.shape[:3])] = torch.nan  # where there is no query there may be anything
    if case.causal:
        last = case.q_pos.amax(1)
        after = torch.arange(k.shape[2]) > last[:, None]
        k[after[:, None].expand(k.shape[:3])] = torch.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "LOGITS_PER_BLOCK", budget)
        got = antidiagonal(case, q, k)
    torch.testing.assert_close(got, case.result(), atol=1000 * EPS, rtol=0)


@settings(max_examples=20)
@given(tiles(), st.booleans())
def test_packed_keys_are_those_that_were_stored(case: Tiles, chunked: bool) -> None:
    packed = ops.encode_kv(case.k, 8)
    expected = antidiagonal(case, case.q, ops.decode_kv(packed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "LOGITS_PER_BLOCK", 1 if chunked else score.LOGITS_PER_BLOCK)
        torch.testing.assert_close(antidiagonal(case, case.q, packed), expected, atol=1000 * EPS, rtol=0)


def test_a_block_of_queries_shares_out_its_tiles() -> None:
    q, k = torch.randn(2, 4, 64, 8), torch.randn(2, 2, 90, 8)
    q_pos = torch.cat((torch.arange(16, 48), torch.arange(48, 58), torch.full((22,), -1)))[None]
    scores = ops.score_antidiagonal(q, k, q_pos, 16, 4, 0.3, True)
    torch.testing.assert_close(scores.sum(-1)[1, 2], torch.tensor([4.0, 4.0, 3.0, 0.0]))
    assert not scores[:, :, 0, 2:].any()  # after the queries


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_in_single(dtype: torch.dtype) -> None:
    q, k = torch.randn(1, 4, 64, 8).to(dtype), torch.randn(1, 2, 64, 8).to(dtype)
    got, exact = (
        ops.score_antidiagonal(a, b, torch.arange(64)[None], 16, 4, 0.3, True)
        for a, b in ((q, k), (q.double(), k.double()))
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=0)


def test_antidiagonals_take_memory_for_one_block_of_queries() -> None:
    def run(tokens: int) -> int:
        q, k = torch.randn(1, 2, tokens, 4), torch.randn(1, 1, tokens, 4)
        with Largest() as seen:
            ops.score_antidiagonal(q, k, torch.arange(tokens)[None], 64, 1, 0.5, True)
        return seen.elements

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "LOGITS_PER_BLOCK", 1 << 15)
        small, large = run(1024), run(2048)
    assert small == 2 * 64 * 1024  # one block's logits: not less, or nothing was measured
    assert large == 2 * small
