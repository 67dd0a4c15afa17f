"""`score_pages` and `pick_blocks` of the compiled library, on the CPU and, marked `cuda`, on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import ops
from hf_longctx.kernels.compiled import select
from hf_longctx.kernels.dispatch import use_backend

from .built import need

pytestmark = pytest.mark.usefixtures("poisoned")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SHARES = ["kv_head", "q_head", "all"]


@dataclass(frozen=True)
class Scored:
    """What a call of `score_pages` is like.

    Args:
        sizes: rows, KV heads, query heads of each, queries of a row, entries, channels.
        vectors: of an entry.
        blank: of each row, how many of the last entries hold no key.
    """

    sizes: tuple[int, int, int, int, int, int] = (2, 2, 4, 1, 150, 128)
    dtype: torch.dtype = torch.bfloat16
    vectors: int = 2
    subs: int = 1
    share: str = "kv_head"
    blank: int = 0


DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SCORED = [
    *(Scored((2, 2, 4, 1, 150, d), t, r) for d in (64, 96, 128, 256) for t in DTYPES for r in (2, 1)),
    *(Scored((2, 2, g, n, 70, 64), share=s) for g in (1, 3, 7, 8) for n in (1, 3, 8) for s in SHARES),
    *(Scored((2, 2, 5, 2, 77, 64), vectors=1, subs=m, share=s) for m in (1, 4) for s in SHARES),
    *(Scored((2, 3, 4, 2, 200, 64), subs=m, blank=30, share=s) for m in (2, 3, 4, 7, 64) for s in SHARES),
    *(Scored((1, 2, 4, 1, 130, 64), t, subs=4, blank=130) for t in DTYPES),
    *(Scored((1, 2, 4, 1, 65, d), t, r) for d in (8, 40, 72) for t in DTYPES for r in (1, 2)),
    Scored((1, 1, 71, 1, 33, 64)),
    Scored((1, 1, 20, 8, 33, 64), vectors=1),
    Scored((1, 2, 20, 8, 33, 256), torch.float16, share="all"),
    Scored((1, 1, 20, 3, 33, 64), torch.float32, subs=2, share="all"),
    Scored((1, 1, 1, 1, 1, 64)),
    Scored((1, 8, 4, 1, 4099, 128)),
]
SCORED_ON_CPU = [Scored((2, 2, 3, 2, 30, 10), torch.float32), Scored((1, 2, 4, 1, 300, 300), subs=100)]


def summaries(case: Scored) -> tuple[Any, ...]:
    """Arguments; the entries are some of a larger tensor, as those of an index are."""
    rows, kv_heads, group, tokens, entries, dim = case.sizes
    generator = torch.Generator().manual_seed(entries)
    q = torch.randn(rows, tokens, kv_heads * group, dim, generator=generator).to(case.dtype).transpose(1, 2)
    all_entries = torch.randn(rows, kv_heads, entries + 5, case.vectors, dim, generator=generator).to(case.dtype)
    if case.vectors == 2:
        all_entries = torch.stack((all_entries.amin(3), all_entries.amax(3)), 3)
        all_entries[:, :, entries - case.blank :, 0] = torch.inf
        all_entries[:, :, entries - case.blank :, 1] = -torch.inf
    return q, all_entries[:, :, :entries], case.subs, case.share


def check_scores(case: Scored, device: str) -> None:
    """Errors are at most one rounding of the largest partial sum for every 16 terms."""
    need(device)
    q, summary, subs, share = summaries(case)
    arguments = (q.to(device), summary.to(device), subs, share)
    assert select.reject_score(*arguments) is None
    got = select.score_pages(*arguments)
    assert torch.equal(got, select.score_pages(*arguments))
    with use_backend("reference"):
        exact = ops.score_pages(q.double(), summary.double(), subs, share)
        terms = summary.double().abs().amax(3, keepdim=True).nan_to_num(posinf=0.0)
        largest = ops.score_pages(q.double().abs(), terms, subs, "q_head").amax(1, keepdim=True)
    assert got.dtype == torch.float32
    assert got.shape == exact.shape
    assert torch.equal(got.cpu().isneginf(), exact.isneginf())
    steps = max(4, case.vectors * q.shape[3] // 16)
    allowed = steps * torch.finfo(torch.float32).eps * largest.clamp(min=1e-9)
    wrong = (got.cpu().double() - exact).abs().nan_to_num(nan=0.0)  # of what is -inf in both
    assert got.cpu().isnan().sum() == 0
    assert bool((wrong <= allowed).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SCORED, ids=str)
def test_scores(case: Scored, device: str) -> None:
    check_scores(case, device)


@pytest.mark.parametrize("case", SCORED_ON_CPU, ids=str)
def test_scores_on_the_cpu(case: Scored) -> None:
    check_scores(case, "cpu")


REFUSED: list[tuple[Scored, dict[int, Any], str]] = [
    (Scored((1, 1, 1, 9, 5, 64)), {}, "takes at most 8 queries a row"),
    (Scored(dtype=torch.float64), {}, "needs queries and summaries in one dtype"),
    (Scored(), {0: torch.zeros(2, 8, 1, 128)}, "needs queries and summaries in one dtype"),
    (Scored(), {1: torch.zeros(2, 2, 0, 2, 128, dtype=torch.bfloat16)}, "takes no empty tensors"),
    (
        Scored(),
        {1: torch.zeros(2, 2, 9, 4, 128, dtype=torch.bfloat16)[:, :, :, ::2]},
        "needs channels, and the entries of a head, that lie side by side",
    ),
    (Scored(), {0: torch.zeros(2, 8, 1, 128, dtype=torch.bfloat16, requires_grad=True)}, "computes no gradients"),
]


@pytest.mark.parametrize(("case", "changed", "reason"), REFUSED)
def test_summaries_that_it_does_not_take(case: Scored, changed: dict[int, Any], reason: str) -> None:
    need("cpu")
    arguments = [changed.get(i, x) for i, x in enumerate(summaries(case))]
    assert reason in str(select.reject_score(*arguments))


@pytest.mark.cuda
def test_summaries_that_it_does_not_take_on_cuda() -> None:
    need("cuda")
    for case, reason in zip(SCORED_ON_CPU, ("multiple of 8 channels", "at most 256"), strict=True):
        q, summary, subs, share = summaries(case)
        assert reason in str(select.reject_score(q.cuda(), summary.cuda(), subs, share))
    q, summary, *_ = summaries(Scored())
    assert "at most 64 sub-blocks" in str(select.reject_score(q.cuda(), summary.cuda(), 65, "all"))


@dataclass(frozen=True)
class Picked:
    """What a call of `pick_blocks` is like.

    Args:
        sizes: rows, heads, queries, blocks.
        kind: how scores are spread: `any`, `few` values, `same`, `odd` (NaN, infinite, both zeros), `near` (close to
            each other), `small` (below the normal numbers).
        high: of each row, block of the last query; those of the queries before it are one less each.
        local: forced blocks up to there.
    """

    sizes: tuple[int, int, int, int] = (2, 2, 1, 100)
    kind: str = "any"
    high: tuple[int, ...] = (99, 40)
    local: int = 2
    sink: int = 1
    take: int = 10


KINDS = ["any", "few", "same", "odd", "near", "small"]
PICKED = [
    *(Picked((2, 3, 1, m), kind, (m - 1, m // 2), take=m // 5) for m in (100, 1000, 8192) for kind in KINDS),
    *(Picked((1, 2, 1, m), kind, (m - 1,), take=m // 50) for m in (8193, 20000, 65536) for kind in ("any", "few")),
    *(Picked((1, 1, 1, 70000), kind, (69999,), take=50000) for kind in KINDS),
    *(Picked((1, 1, 1, 300), "any", (299,), take=t) for t in (0, 1, 2, 295, 296, 297, 298, 1000)),
    *(Picked((2, 2, n, 500), "few", (499, 7), take=30) for n in range(2, 9)),
    Picked((3, 2, 4, 50), "any", (-1, 2, 49)),
    Picked((3, 2, 1, 50), "any", (0, 1, 2), local=5),
    Picked((2, 2, 1, 50), "any", (30,), local=40),
    Picked((2, 2, 1, 50), "any", (30,), sink=40),
    Picked((2, 2, 1, 50), "any", (49, 3), sink=0, local=1, take=0),
    Picked((1, 1, 1, 1), "any", (0,)),
    Picked((1, 40, 8, 33), "few", (32,), take=5),
]


def scores_of(case: Picked) -> tuple[Any, ...]:
    """Arguments."""
    made = torch.Generator().manual_seed(case.take)
    scores = torch.randn(case.sizes, generator=made)
    if case.kind == "few":
        scores = (scores * 2).round()
    elif case.kind == "same":
        scores = torch.full(case.sizes, -0.5)
    elif case.kind == "near":
        scores = 40 + scores * 1e-5
    elif case.kind == "small":
        scores = scores * 1e-41
    elif case.kind == "odd":
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, -torch.nan, 1.0])
        scores = odd[torch.randint(len(odd), case.sizes, generator=made)]
    count = case.sizes[2]
    high = (torch.tensor(case.high)[:, None] - torch.arange(count - 1, -1, -1)).clamp(min=-1)
    low = (high - case.local + 1).clamp(min=0)
    return scores, low, high, case.sink, case.take, None, case.local


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", PICKED, ids=str)
def test_picks(case: Picked, device: str) -> None:
    need(device)
    arguments = scores_of(case)
    moved = tuple(x.to(device) if isinstance(x, Tensor) else x for x in arguments)
    assert select.reject_pick(*moved) is None
    got = select.pick_blocks(*moved)
    with use_backend("reference"):
        expected = ops.pick_blocks(*arguments)
    assert got.dtype == expected.dtype
    assert torch.equal(got.cpu(), expected)
    assert torch.equal(got, select.pick_blocks(*moved))


def test_what_it_does_not_pick() -> None:
    need("cpu")
    scores, low, high, *rest = scores_of(Picked())
    share = torch.tensor([0.5, 0.5])
    assert "a share of the attention on CUDA only" in str(select.reject_pick(scores, low, high, 1, None, share, 2))
    assert "needs scores in float32" in str(select.reject_pick(scores.double(), low, high, *rest))
    assert "takes no empty tensors" in str(select.reject_pick(scores[:0], low, high, *rest))


@pytest.mark.cuda
def test_captured_calls_choose_anew() -> None:
    """Scores and positions lie in the same memory; what they are may change."""
    need("cuda")
    q, summary, subs, share = (x.cuda() if isinstance(x, Tensor) else x for x in summaries(Scored(subs=4)))
    high = torch.tensor([[30], [20]], device="cuda")

    def choose() -> Tensor:
        scores = select.score_pages(q, summary, subs, share)
        return select.pick_blocks(scores, high - 1, high, 1, 5, None, 2)

    choose()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids = choose()
    seen = []
    for step in range(3):
        q.neg_()
        high.add_(step)
        graph.replay()
        seen.append(ids.clone())
        assert torch.equal(ids, choose())
    assert not torch.equal(seen[0], seen[1])
