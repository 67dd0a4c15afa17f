"""Forced blocks, budgets, sharing, kept choices and mass, each by hand."""

from __future__ import annotations

import pytest
import torch

import hf_longctx as lc
from hf_longctx.plan import Selector
from hf_longctx.select.budgets import Mass, TopK
from hf_longctx.select.scorers import Antidiagonal, RepresentativeDot, UpperBound
from hf_longctx.select.summaries import MinMax, Representatives
from hf_longctx.testing.attend import attend
from hf_longctx.testing.choice import forced_blocks, pick_blocks
from hf_longctx.testing.visible import Span, spans

from .scenes import scene

BOUND = UpperBound(MinMax(4, 4))
DOT = RepresentativeDot(Representatives(2, 1), 2)


@pytest.mark.parametrize(
    ("sink", "local", "first", "last", "forced"),
    [
        (0, 1, 17, 17, {4}),
        (1, 1, 17, 17, {0, 4}),
        (5, 1, 17, 17, {0, 1, 4}),
        (0, 2, 16, 16, {3, 4}),
        (0, 2, 17, 17, {4}),
        (0, 6, 16, 19, {2, 3, 4}),
        (0, 99, 16, 19, {0, 1, 2, 3, 4}),
        (9, 1, 2, 2, {0}),
    ],
)
def test_forced_blocks(sink: int, local: int, first: int, last: int, forced: set[int]) -> None:
    assert forced_blocks(Selector(BOUND, TopK(4), sink, local), first, last) == forced


@pytest.mark.parametrize(
    ("blocks", "picked"), [(1, {2}), (2, {2, 1}), (3, {2, 1, 4}), (4, {2, 1, 4, 3}), (9, {2, 1, 4, 3})]
)
def test_the_best_and_of_equal_ones_the_first(blocks: int, picked: set[int]) -> None:
    selector = Selector(BOUND, TopK(4 * blocks))
    assert pick_blocks(selector, [9, 3, 5, 1, 3, 9], {0, 5}) == picked


@pytest.mark.parametrize(
    ("tau", "picked"),
    [(0.4, set()), (0.41, {1}), (0.6, {1}), (0.61, {1, 2}), (0.81, {1, 2, 3}), (0.9, {1, 2, 3}), (0.91, {1, 2, 3, 4})],
)
def test_a_share_of_mass(tau: float, picked: set[int]) -> None:
    """Forced blocks hold 4 of 10; then 2, 2 and 1, 1 come in order until what came before is enough."""
    assert pick_blocks(Selector(Antidiagonal(4, 2), Mass(tau)), [3, 2, 2, 1, 1, 1], {0, 5}, tau) == picked


def test_all_of_it_is_everything_whatever_rounding_says() -> None:
    scores = [0.1] * 3 + [1e-30] * 3
    assert pick_blocks(Selector(Antidiagonal(4, 2), Mass(1.0)), scores, {0}, 1.0) == {1, 2, 3, 4, 5}


def test_a_call_of_few_columns_decodes_where_there_were_some_before() -> None:
    assert spans([8, 8, 9, 1]) == [Span(0, 7, False), Span(8, 15, True), Span(16, 24, False), Span(25, 25, True)]
    real = torch.tensor([0, 0, 0, 1, 1])
    assert spans([2, 2, 1], real) == [Span(0, 0, True), Span(1, 1, True)]


def wanting(blocks: list[int], keys: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys of one head, so that the query at position x wants the block `blocks[x]` of two tokens most."""
    angle = torch.arange(keys) // 2 * 0.3
    k = torch.stack((angle.cos(), angle.sin()), -1)
    wanted = torch.tensor(blocks) * 0.3
    return torch.stack((wanted.cos(), wanted.sin()), -1)[None], k[None]


def blocks_read(reads: torch.Tensor, head: int, query: int) -> set[int]:
    return {int(y) // 2 for y in reads[head, query].nonzero()[:, 0]}


def policy(selector: Selector, prefill: Selector | None = None) -> lc.HeadPolicy:
    return lc.HeadPolicy(lc.KeepAll(), lc.Absolute(), prefill=prefill, decode=selector)


def test_a_choice_is_kept_for_some_tokens_and_dropped_by_a_prompt() -> None:
    q, k = wanting([0] * 5 + [1, 0, 0, 0] + [2, 3] + [0] * 9, keys=20)
    selector = Selector(UpperBound(MinMax(2, 1)), TopK(2), refresh_every=3)
    calls = [Span(0, 4, False), Span(5, 5, True), Span(6, 9, True), Span(10, 18, False), Span(19, 19, True)]
    _, reads = attend(scene(q, k, calls), policy(selector))
    assert [blocks_read(reads, 0, x) for x in range(5)] == [{*range(x // 2 + 1)} for x in range(5)]
    assert blocks_read(reads, 0, 5) == {1, 2}  # the first decode token chooses block 1
    assert blocks_read(reads, 0, 6) == {1, 2, 3}  # block 2 was forced then, block 3 is now
    assert blocks_read(reads, 0, 7) == {1, 2, 3}
    assert blocks_read(reads, 0, 8) == {0, 4}  # chosen again
    assert blocks_read(reads, 0, 9) == {0, 4}
    assert blocks_read(reads, 0, 19) == {0, 9}  # a prompt came between: chosen though the turn was not due


def test_heads_share_the_largest_bound_or_the_mean_product() -> None:
    """One head wants block 0 much; three want block 3 a little: the loudest wins, or the block between."""
    loud, k = wanting([0] * 10, keys=10)
    many, _ = wanting([3] * 10, keys=10)
    q = torch.cat((2 * loud, many, many, many))
    at = scene(q, k, [Span(0, 8, False), Span(9, 9, True)])
    for scorer, shared in ((UpperBound(MinMax(2, 2)), 0), (DOT, 2)):
        for share, chosen in (("q_head", [0, 3, 3, 3]), ("kv_head", [shared] * 4), ("all", [shared] * 4)):
            _, reads = attend(at, policy(Selector(scorer, TopK(2), share=share)))
            assert [blocks_read(reads, h, 9) for h in range(4)] == [{c, 4} for c in chosen]
    two = scene(torch.cat((many, many, 2 * loud, 2 * loud)), torch.cat((k, k)), [Span(0, 8, False), Span(9, 9, True)])
    for share, chosen in (("kv_head", [3, 3, 0, 0]), ("all", [0] * 4)):
        _, reads = attend(two, policy(Selector(UpperBound(MinMax(2, 2)), TopK(2), share=share)))
        assert [blocks_read(reads, h, 9) for h in range(4)] == [{c, 4} for c in chosen]


def test_each_head_has_its_own_share_of_mass() -> None:
    at = scene(torch.zeros(2, 8, 2), torch.ones(2, 8, 2), [Span(0, 7, False)])
    _, reads = attend(at, policy(None, Selector(Antidiagonal(2, 2), Mass((0.2, 0.6)))))
    # the last block's queries give each of the four blocks 1/4; its own is forced
    assert blocks_read(reads, 0, 7) == {3}
    assert blocks_read(reads, 1, 7) == {0, 1, 3}


def test_query_blocks_are_aligned_and_cut_by_calls() -> None:
    q, k = wanting([0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 2, 0, 4, 1], keys=14)
    selector = Selector(DOT, TopK(2))
    _, whole = attend(scene(q, k, [Span(0, 13, False)]), policy(selector, selector))
    _, halves = attend(scene(q, k, [Span(0, 3, False), Span(4, 13, False)]), policy(selector, selector))
    assert torch.equal(whole, halves)
    assert blocks_read(whole, 0, 11) == blocks_read(whole, 0, 10) == {1, 5}  # (2 + 0) / 2 wanted
    _, cut = attend(scene(q, k, [Span(0, 10, False), Span(11, 13, False)]), policy(selector, selector))
    assert [blocks_read(cut, 0, x) for x in (10, 11)] == [{2, 5}, {0, 5}]
    assert torch.equal(cut[0, 12:], whole[0, 12:])
    _, steps = attend(scene(q, k, [Span(0, 10, False), Span(11, 13, True)]), policy(selector, selector))
    assert [blocks_read(steps, 0, x) for x in (11, 12, 13)] == [{0, 5}, {4, 6}, {1, 6}]


def test_a_prompt_chooses_for_every_block_of_queries() -> None:
    q, k = wanting([0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 2, 2, 4, 4], keys=14)
    often, seldom = (Selector(DOT, TopK(2), refresh_every=every) for every in (1, 9))
    at = scene(q, k, [Span(0, 13, False)])
    assert torch.equal(attend(at, policy(often, often))[1], attend(at, policy(seldom, seldom))[1])


NEITHER, FIRST, SECOND = [0.0, 0.0], [3.0, 0.0], [0.0, 9.0]
EARLY = [NEITHER] * 3 + [FIRST] * 2 + [SECOND] * 7 + [[4.0, 0.0]]
LATE = [NEITHER] * 3 + [SECOND] * 9 + [[4.0, 0.0]]
EDGE = [NEITHER] * 3 + [SECOND, [20.0, 0.0]] + [NEITHER] * 7 + [[4.0, 0.0]]


@pytest.mark.parametrize(
    ("heads", "local", "chosen"),
    [
        ([EARLY], 2, 1),
        ([EARLY], 9, 0),
        ([EARLY, LATE], 2, 0),
        ([EARLY, [NEITHER] * 12 + [[4.0, 0.0]]], 2, 1),
        ([EDGE], 2, 0),
        ([EDGE], 3, 1),
    ],
    ids=["near", "all", "two heads", "two heads, one silent", "just too far", "just near"],
)
def test_mass_from_near_queries_of_all_heads_decides_what_stands_for_a_block(
    heads: list[list[list[float]]], local: int, chosen: int
) -> None:
    """Block 1 has keys (1, 0) and (0, 1), the others (1/2, 1/2); the last query wants block 1 if (1, 0) stands for it.

    The queries at 3 and 4 look at (1, 0) in one head, at (0, 1) in the other; those from 5 to 11 always at (0, 1). At
    the edge, the query at 4 looks at (1, 0), two before it, and weighs more than the one at 3, which looks at (0, 1).
    """
    k = torch.full((1, 13, 2), 0.5)
    k[0, 2], k[0, 3] = torch.tensor([1.0, 0]), torch.tensor([0, 1.0])
    selector = Selector(RepresentativeDot(Representatives(2, 1), 1), TopK(2), local=local)
    _, reads = attend(scene(heads, k, [Span(0, 12, False)]), policy(selector, selector))
    far = (12 - local + 1) // 2
    assert blocks_read(reads, 0, 12) == {chosen, *range(far, 7)}
