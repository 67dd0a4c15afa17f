"""What queries read of the blocks that they could see."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import dispatch
from hf_longctx.kernels.count import count_blocks


@dataclass(frozen=True)
class Case:
    """Rows, queries and blocks of a choice; heads of each layer; where queries stand, as `[B or 1, N]`."""

    rows: int
    queries: int
    chosen: int
    heads: tuple[int, ...]
    pos: tuple[tuple[int, ...], ...]
    block: int = 16


CASES = (
    Case(1, 1, 257, (8,) * 70, ((131_000,),)),
    Case(3, 1, 40, (8, 1, 2), ((900,), (-1,), (15,))),
    Case(2, 3, 9, (2, 2), ((100, 101, -1),), block=64),
    Case(1, 1, 1, (1,), ((0,),)),
)


def made(case: Case, device: str) -> tuple[Tensor, list[Tensor], Tensor, int]:
    """Arguments of the operation."""
    generator = torch.Generator().manual_seed(0)
    most = max(map(max, case.pos)) // case.block + 3  # some behind the query's own
    ids = [
        torch.randint(-2, most, (case.rows, heads, case.queries, case.chosen), generator=generator).clamp(min=-1)
        for heads in case.heads
    ]
    tally, pos = torch.tensor([5, 7], device=device), torch.tensor(case.pos, device=device)
    return tally, [x.int().to(device) for x in ids], pos, case.block


def by_hand(case: Case) -> list[int]:
    """The tally afterwards, number by number."""
    tally, ids, pos, block = made(case, "cpu")
    read, seen = tally.tolist()
    places = pos.expand(case.rows, -1).tolist()
    for of_layer in ids:
        for row, heads in zip(places, of_layer.tolist(), strict=True):
            for head in heads:
                for place, blocks in zip(row, head, strict=True):
                    read += sum(0 <= one * block <= place for one in blocks)
                    seen += len(range(0, place + 1, block))
    return [read, seen]


@pytest.mark.parametrize("case", CASES)
def test_is_what_the_definition_says(case: Case) -> None:
    arguments = made(case, "cpu")
    count_blocks(*arguments)
    assert arguments[0].tolist() == by_hand(case)


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES)
def test_the_library_counts_the_same(case: Case) -> None:
    arguments = made(case, "cuda")
    with dispatch.use_backend("compiled"):
        count_blocks(*arguments)
        count_blocks(*arguments)
    first, twice = made(case, "cpu")[0], arguments[0].cpu()
    assert (twice - first).tolist() == [2 * (x - y) for x, y in zip(by_hand(case), first.tolist(), strict=True)]
