"""Heads that go block by block read a prompt at once while it lies in their local window: with the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_longctx as lc
from hf_longctx import group
from hf_longctx.cache.marks import Marks
from hf_longctx.cache.placement import HostLRU
from hf_longctx.cache.positions import Clamped
from hf_longctx.context import Forward, Rotary
from hf_longctx.kernels.ops import Logits
from hf_longctx.methods.kv import kv_format
from hf_longctx.plan import Selector
from hf_longctx.select.budgets import TopK
from hf_longctx.select.scorers import RepresentativeDot, RepresentativeShare
from hf_longctx.select.summaries import Means, Representatives

BLOCK, LOCAL, Q_BLOCK, HEADS, DIM, ROWS = 8, 64, 16, 2, 8, 2
CALLS = (40, 20, 1, 43, 1, 30)
"""Tokens: the first two calls and the third, which decodes, lie in the local window."""
PADDED = torch.tensor([[0] * 7 + [1] * 33, [1] * 40])


def policy(placement: HostLRU | None, kv: str, weighs: bool = False) -> lc.HeadPolicy:
    scorer: Any = RepresentativeDot(Representatives(BLOCK, 2), Q_BLOCK) if weighs else None
    reads = Selector(scorer or RepresentativeShare(Means(BLOCK, 4), Q_BLOCK), TopK(2 * BLOCK), BLOCK, LOCAL)
    return lc.HeadPolicy(lc.KeepAll(), Clamped(LOCAL - 1), reads, reads, kv_format(kv, "test"), placement)


def read(own: lc.HeadPolicy, mask: Tensor | None) -> tuple[Tensor, Tensor, list[bool]]:
    """What a layer gives for a text in several calls, what is kept beside its keys, and which calls went at once."""
    plan = lc.Plan("test", (lc.LayerPlan((lc.HeadGroup(tuple(range(HEADS)), own),)),))
    cache, made = lc.LongContextCache(plan), torch.Generator().manual_seed(0)
    rotary = (Rotary(torch.rand(DIM // 2, generator=torch.Generator().manual_seed(1))),)
    out, went, stored = [], [], cache.stacks[0].stores[0]
    with torch.no_grad():
        for tokens in CALLS:
            if mask is not None:
                end = cache.ledger.columns + tokens
                mask = torch.cat((mask, mask.new_ones(ROWS, max(0, end - mask.shape[1]))), 1)
            step = cache.begin(tokens, ROWS, torch.device("cpu"), mask)
            forward = Forward(None, plan, step, cache, rotary)  # type: ignore[arg-type]  # facts are not read
            q, k, v = (torch.randn(ROWS, n * HEADS, tokens, DIM, generator=made) for n in (2, 1, 1))
            assert own.prefill is not None
            went.append(group.reads_at_once(forward, 0, own, own.prefill, step))
            made_out = group.attend_group(forward, 0, stored[0], stored, q, k, v, Logits(DIM**-0.5))
            assert made_out is not None
            out.append(made_out if step.real is None else made_out * step.real[:, None, :, None])
            cache.commit(step)
    index = stored[1].index
    assert isinstance(index, Marks)
    closed = (cache.ledger.columns - LOCAL) // BLOCK * (BLOCK // 4)
    entries = index.entries
    assert entries is not None
    return torch.cat(out, 2), entries[:, :, : closed - 4], went


@pytest.mark.parametrize("mask", [None, PADDED], ids=["alike", "padded"])
@pytest.mark.parametrize("kv", ["native", "int8"])
@pytest.mark.parametrize("placement", [None, HostLRU(6)], ids=["device", "host"])
def test_as_block_by_block(
    placement: HostLRU | None, kv: str, mask: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    got, entries, went = read(policy(placement, kv), mask)
    assert went == [True, True, False, False, False, False]
    monkeypatch.setattr(group, "reads_at_once", lambda *_: False)
    expected, in_turn, never = read(policy(placement, kv), mask)
    assert not any(never)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)
    assert torch.equal(entries, in_turn)


def test_not_where_attention_is_added_up() -> None:
    _, _, went = read(policy(None, "native", weighs=True), None)
    assert not any(went)
