"""What is kept beside the keys, against what follows from lists of keys and of attention per row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hf_longctx as lc
from hf_longctx.cache.kv_format import Int4KV, Int8KV
from hf_longctx.cache.marks import Marks
from hf_longctx.cache.positions import Clamped
from hf_longctx.kernels import ops
from hf_longctx.plan import Selector
from hf_longctx.select.budgets import TopK
from hf_longctx.select.scorers import RepresentativeDot, UpperBound
from hf_longctx.select.summaries import Means, MinMax, Representatives

from .vectors import HEADS, Text, change, reals

INV_FREQ = torch.tensor([1.0, 0.3])
FORMATS = st.sampled_from([None, Int8KV(), Int4KV()])


def bounded(block: int, sub: int, kv: Any = None) -> lc.HeadPolicy:
    selector = Selector(UpperBound(MinMax(block, sub)), TopK(block))
    return lc.HeadPolicy(lc.KeepAll(), lc.Absolute(), decode=selector, kv=kv)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@settings(max_examples=60)
@given(data=st.data(), kv=FORMATS, sub=st.sampled_from([1, 3, 8]))
def test_bounds_are_those_of_the_stored_keys(padded: bool, data: st.DataObject, kv: Any, sub: int) -> None:
    text, cropped = Text(bounded(2 * sub, sub, kv), rows=data.draw(st.integers(1, 3))), False
    for _ in range(data.draw(st.integers(1, 6))):
        step, k, v = text.draw(data.draw(reals(len(text.keys), padded)))
        if data.draw(st.booleans()):
            text.store.append(k, v, step)
        else:
            text.store.write(k, v, step)
        text.cache.commit(step)
        entries, longest = text.store.summaries, text.cache.ledger.columns
        assert entries.shape[1:] == (HEADS, -(-longest // sub), 2, 4)
        for row, keys in enumerate(text.keys):
            for j in range(entries.shape[2]):
                if keys[j * sub : (j + 1) * sub]:
                    inside = torch.stack(keys[j * sub : (j + 1) * sub])
                    expected = torch.stack((inside.amin(0), inside.amax(0)), 1)
                    if not cropped or bool((step.lengths_after > step.lengths).expand(len(text.keys))[row]):
                        assert torch.equal(entries[row, :, j], expected)
                elif not cropped:
                    assert bool((entries[row, :, j, 0] == float("inf")).all())
                    assert bool((entries[row, :, j, 1] == float("-inf")).all())
        before = text.cache.ledger.columns
        change(text, data)
        cropped = cropped or text.cache.ledger.columns < before


def marked(block: int, count: int, local: int, q_block: int, kv: Any = None, distance: int | None = None) -> Any:
    selector = Selector(RepresentativeDot(Representatives(block, count), q_block), TopK(block), local=local)
    positions = lc.Absolute() if distance is None else Clamped(distance)
    return lc.HeadPolicy(lc.KeepAll(), positions, selector, selector, kv=kv)


def runs(block: int, sub: int) -> Any:
    selector = Selector(RepresentativeDot(Means(block, sub), 8), TopK(block), local=5)
    return lc.HeadPolicy(lc.KeepAll(), lc.Absolute(), selector, selector)


class Attention:
    """Attention that keys got, as one number per row, head and position; representatives by the paper's words."""

    def __init__(self, text: Text, block: int, count: int, local: int) -> None:
        self.text, self.block, self.count, self.local = text, block, count, local
        self.mass: list[dict[int, Tensor]] = [{} for _ in text.keys]
        self.due = [0 for _ in text.keys]  # closed blocks of each row before the last call

    def look(self, step: Any, ids: Tensor) -> Tensor:
        """Random attention of the call's queries to keys near them, in blocks `ids` `[K]`: `[B, H, 1, K * block]`."""
        out = torch.zeros(len(self.mass), HEADS, 1, ids.numel() * self.block)
        for row, queries in enumerate(step.pos.expand(len(self.mass), -1).tolist()):
            real = [q for q in queries if q >= 0]
            for place, pos in enumerate((ids[:, None] * self.block + torch.arange(self.block)).flatten().tolist()):
                if pos >= 0 and any(0 <= q - pos < self.local for q in real):
                    paid = torch.rand(HEADS, generator=self.text.random).mul(4).round() / 4  # ties are common
                    out[row, :, 0, place] = paid
                    self.mass[row][pos] = self.mass[row].get(pos, torch.zeros(HEADS)) + paid
        return out

    def call(self, real: Tensor, turns: ops.Turns | None, shared: bool) -> None:
        """Store a call, and let its queries look at most blocks."""
        text, block = self.text, self.block
        step, k, v = text.draw(real)
        text.store.write(k, v, step, turns)
        ids = torch.arange(-(-(step.columns + step.tokens) // block))
        ids = torch.cat((ids[torch.rand(len(ids), generator=text.random) < 0.8], torch.tensor([-1])))
        shown = ids.to(torch.int32).expand(len(text.keys), 1 if shared else HEADS, 1, -1)
        ends = step.lengths.expand(len(text.keys)).tolist()
        self.due = [max(0, end - self.local + 1) // block for end in ends]
        text.store.add_mass(shown, self.look(step, ids), block)
        text.cache.commit(step)

    def check(self, turns: ops.Turns | None) -> None:
        """Blocks that were closed before the last call have their representatives."""
        for row, due in enumerate(self.due):
            for j in range(due):
                got, expected = self.text.store.summaries[row, :, j, 0], self.representative(row, j, turns)
                torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)

    def representative(self, row: int, j: int, turns: ops.Turns | None) -> Tensor:
        """`[H, D]`, of block j, which is closed."""
        places = range(j * self.block, (j + 1) * self.block)
        out = []
        for head in range(HEADS):
            paid = [float(self.mass[row].get(p, torch.zeros(HEADS))[head]) for p in places]
            best = sorted(range(self.block), key=lambda i: (-paid[i], i))[: self.count]
            keys = torch.stack([self.text.keys[row][places[i]][head] for i in best])
            if turns is not None:
                at = torch.tensor([places[i] for i in best])
                at = at - turns.lap * turns.laps(at)
                keys = ops.rotate(keys[None, None], -at[None], INV_FREQ, turns.interleaved)[0, 0]
            out.append(keys.mean(0))
        return torch.stack(out)


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@settings(max_examples=40)
@given(
    data=st.data(),
    kv=FORMATS,
    shape=st.sampled_from([(4, 2, 5, 7), (4, 4, 1, 1), (3, 1, 9, 3), (8, 3, 20, 40)]),
    clamp=st.booleans(),
)
def test_representatives_are_found_when_blocks_close(
    padded: bool, data: st.DataObject, kv: Any, shape: tuple[int, int, int, int], clamp: bool
) -> None:
    block, count, local, q_block = shape
    text = Text(marked(block, count, local, q_block, kv, 50 if clamp else None), rows=data.draw(st.integers(1, 3)))
    attention = Attention(text, block, count, local)
    turns = ops.Turns(torch.zeros(1, 1), 51, 0, INV_FREQ, data.draw(st.booleans()), 50) if clamp else None
    for _ in range(data.draw(st.integers(1, 12))):
        shared = data.draw(st.booleans())
        attention.call(data.draw(reals(len(text.keys), padded, q_block)), turns, shared)
        attention.check(turns)
        rows = data.draw(st.lists(st.integers(0, len(text.keys) - 1), min_size=1, max_size=3))
        text.pick(rows)
        attention.mass = [dict(attention.mass[row]) for row in rows]


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("shape", [(4, 2, 5, 7), (4, 4, 1, 1), (8, 3, 20, 16)])
def test_representatives_of_a_text_that_goes_round_the_ring(padded: bool, shape: tuple[int, int, int, int]) -> None:
    block, count, local, q_block = shape
    text = Text(marked(block, count, local, q_block, None, 50), rows=2)
    attention = Attention(text, block, count, local)
    turns = ops.Turns(torch.zeros(1, 1), 51, 0, INV_FREQ, False, 50)
    while text.cache.ledger.columns < 120:
        real = torch.rand(2, q_block, generator=text.random) < (0.7 if padded else 1)
        attention.call(real, turns, shared=False)
    attention.check(turns)
    assert text.store.index._mass.shape[2] < min(map(len, text.keys)) - local  # or it would not have gone round


def test_what_has_been_attended_to_cannot_be_taken_back() -> None:
    text = Text(marked(4, 2, 5, 8), rows=1)
    step, k, v = text.draw(torch.ones(1, 8, dtype=torch.bool))
    text.store.write(k, v, step)
    text.cache.commit(step)
    text.cache.crop(0)
    with pytest.raises(ValueError, match=r"crop: expected 0 tokens to take back, .*; got 2\. Start a new cache"):
        text.cache.crop(-2)
    assert text.cache.get_seq_length() == 8


def test_the_means_of_far_keys_stay_when_near_ones_are_taken_back() -> None:
    selector = Selector(RepresentativeDot(Means(4, 2), 8), TopK(4), local=9)
    text = Text(lc.HeadPolicy(lc.KeepAll(), lc.Absolute(), selector, selector), rows=1)
    for cut in (0, 5, 0, 8, 0, 0):
        step, k, v = text.draw(torch.ones(1, 8, dtype=torch.bool))
        text.store.write(k, v, step)
        text.cache.commit(step)
        with pytest.raises(ValueError, match=r"crop: expected at most 8 tokens to take back, .*; got 9\. Start a new"):
            text.store.crop(9, text.cache.get_seq_length())
        if cut:
            text.cache.crop(-cut)
            del text.keys[0][-cut:]
            text.reals = [torch.ones(1, len(text.keys[0]), dtype=torch.bool)]
        closed = max(0, int(step.lengths) - 9 + 1) // 4
        for j in range(2 * closed):
            mean = torch.stack(text.keys[0][2 * j : 2 * j + 2]).mean(0)
            torch.testing.assert_close(text.store.summaries[0, :, j, 0], mean)
    assert closed == 4


@pytest.mark.parametrize("bits", [4, 8])
def test_means_in_few_bits_are_those_that_a_store_would_read_back(bits: int) -> None:
    """Rows of their own lengths, chosen anew, and saved and restored."""
    selectors = [Selector(RepresentativeDot(Means(4, 2, n), 8), TopK(4), local=5) for n in (None, bits)]
    native, packed = (Text(lc.HeadPolicy(lc.KeepAll(), lc.Absolute(), s, s), rows=2) for s in selectors)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[0, :3] = False
    for columns in (real, *[torch.ones(2, 8, dtype=torch.bool)] * 4, *[torch.ones(2, 1, dtype=torch.bool)] * 6):
        for text in (native, packed):
            step, k, v = text.draw(columns)
            text.store.write(k, v, step)
            text.cache.commit(step)
    entries, got = (text.store.summaries for text in (native, packed))
    assert int((entries != 0).any(-1).sum()) > 2 * HEADS * 14
    expected = ops.decode_kv(ops.encode_kv(entries[:, :, :, 0], bits))
    assert torch.equal(got[:, :, :, 0].where(entries[:, :, :, 0] != 0, 0), expected.where(entries[:, :, :, 0] != 0, 0))
    assert 0 < packed.store.index.nbytes < native.store.index.nbytes
    twin = Marks(selectors[1].scorer.summary, selectors[1])
    twin.restore(*packed.store.index.state())
    assert torch.equal(twin.entries, got)
    packed.store.map_rows(torch.tensor([1, 1]))
    assert torch.equal(packed.store.summaries, got[[1, 1]])


def test_bytes_count_the_index() -> None:
    plain = Text(lc.HeadPolicy(lc.KeepAll(), lc.Absolute()), rows=1)
    for policy, beside in (
        (bounded(16, 4), 64 // 4 * 2 * 4 * 4),  # sub-blocks, bounds, channels, bytes
        (runs(16, 4), 64 // 4 * 4 * 4),  # means, channels, bytes
        (marked(16, 2, 5, 8), 64 // 16 * 4 * 4 + (5 + 2 * 16 + 2 * 8) * 4),  # representatives and the ring of mass
    ):
        text = Text(policy, rows=1)
        for driven in (plain, text):
            step, k, v = driven.draw(torch.ones(1, 8, dtype=torch.bool))
            driven.store.write(k, v, step)
            driven.cache.commit(step)
        assert text.store.kv_bytes - 2 * HEADS * 64 * 4 * 4 == HEADS * beside
        assert text.cache.kv_bytes == text.store.kv_bytes == text.cache.ledger.kv_bytes
