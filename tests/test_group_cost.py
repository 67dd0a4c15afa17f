"""What a turn of a long prompt costs beside its arithmetic: operations, waits, and bytes while the text is short."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hf_longctx as lc
from hf_longctx.cache import host
from hf_longctx.cache.placement import HostLRU
from hf_longctx.cache.positions import Clamped
from hf_longctx.context import Forward, Rotary
from hf_longctx.group import attend_group
from hf_longctx.kernels import dispatch
from hf_longctx.kernels.ops import Logits
from hf_longctx.plan import Selector
from hf_longctx.select.budgets import TopK
from hf_longctx.select.scorers import RepresentativeDot
from hf_longctx.select.summaries import Representatives

BLOCK, LOCAL, Q_BLOCK, HEADS, DIM, ROWS = 8, 64, 32, 2, 8, 2
LOOKS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


class Count(TorchDispatchMode):
    """Counts operations that compute or copy, and those that would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.looks = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += not func.is_view
        self.looks += func.name() in LOOKS
        return out


def policy(placement: HostLRU | None) -> lc.HeadPolicy:
    reads = Selector(RepresentativeDot(Representatives(BLOCK, 2), Q_BLOCK), TopK(4 * BLOCK), BLOCK, LOCAL)
    return lc.HeadPolicy(lc.KeepAll(), Clamped(LOCAL - 1), reads, reads, placement=placement)


class Text:
    """One layer that reads chunk after chunk of random tokens."""

    def __init__(self, placement: HostLRU | None, rows: int = ROWS, heads: int = HEADS) -> None:
        self.rows, self.heads = rows, heads
        group = lc.HeadGroup(tuple(range(heads)), policy(placement))
        self.plan = lc.Plan("test", (lc.LayerPlan((group,)),))
        self.cache = lc.LongContextCache(self.plan)
        self.made = torch.Generator().manual_seed(0)

    def read(self, tokens: int) -> Tensor:
        step = self.cache.begin(tokens, self.rows, torch.device("cpu"), None)
        rotary = (Rotary(torch.rand(DIM // 2, generator=torch.Generator().manual_seed(1))),)
        forward = Forward(None, self.plan, step, self.cache, rotary)  # type: ignore[arg-type]  # facts are not read
        q, k, v = (
            torch.randn(self.rows, n * self.heads, tokens, DIM, generator=self.made, dtype=torch.bfloat16)
            for n in (2, 1, 1)
        )
        stored = self.cache.stacks[0].stores[0]
        out = attend_group(forward, 0, stored[0], stored, q, k, v, Logits(DIM**-0.5))
        self.cache.commit(step)
        return out

    def cost(self, turns: int) -> Count:
        with torch.no_grad(), Count() as count:
            self.read(turns * Q_BLOCK)
        return count


@pytest.mark.parametrize(("placement", "most"), [(None, 290), (HostLRU(6), 390)], ids=["device", "host"])
def test_operations_of_a_turn_are_few_whatever_the_length_rows_and_heads(
    placement: HostLRU | None, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "SEGMENT", 1 << 14)
    for rows, heads, before in ((1, 1, 512), (4, 3, 512), (2, 2, 4096)):
        text = Text(placement, rows, heads)
        with torch.no_grad():
            text.read(before)
        short, long = text.cost(1), text.cost(9)
        assert (long.operations - short.operations) / 8 <= most


@pytest.mark.parametrize("placement", [None, HostLRU(6)], ids=["device", "host"])
def test_nothing_on_the_device_is_looked_at(placement: HostLRU | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what moves blocks here, which a device does by itself."""
    text, moves = Text(placement), []
    with torch.no_grad():
        text.read(512)
    call = dispatch.call

    def counted(op: str, *args: Any) -> Any:
        with Count() as count:
            out = call(op, *args)
        if op in ("bring_blocks", "copy_blocks"):
            moves.append(count.looks)
        return out

    monkeypatch.setattr(dispatch, "call", counted)
    assert text.cost(8).looks == sum(moves)
    assert len(moves) == (0 if placement is None else 16)


def test_a_short_text_takes_no_more_than_its_blocks_and_what_is_kept_beside() -> None:
    each = 2 * DIM * 2  # keys and values, channels, bytes
    for tokens in (1, 20, 100):
        text = Text(HostLRU(500))
        with torch.no_grad():
            text.read(tokens)
        slots = -(-tokens // BLOCK) * BLOCK
        beside = text.cache.stacks[0].stores[0][1].index.nbytes
        assert text.cache.kv_bytes - beside == ROWS * HEADS * slots * each
        page = -(-slots // 64) * 64
        assert beside <= ROWS * HEADS * page * (4 + DIM * 2 / BLOCK)  # attention that keys got, and representatives


def test_memory_grows_with_the_text_up_to_its_bound() -> None:
    text, held = Text(HostLRU(6)), []
    store = text.cache.stacks[0].stores[0][1]
    with torch.no_grad():
        for _ in range(20):
            text.read(Q_BLOCK)
            held.append(store.k.shape[2])
    bound = store.pages.slots
    assert held == sorted(held)
    assert held[0] == Q_BLOCK
    assert held[-1] == bound < 20 * Q_BLOCK
    assert all(slots <= min(bound, (n + 1) * Q_BLOCK * 33 // 32 + BLOCK) for n, slots in enumerate(held))
