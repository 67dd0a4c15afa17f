"""Bounds beside a paged cache say what the keys in the blocks say, however the blocks came to be filled."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_longctx.select.summaries import MinMax
from hf_longctx.vllm.bounds import BlockBounds, Ledger

HEADS, DIM = 2, 8


class Engine:
    """A toy of vLLM: hands out physical blocks, writes tokens of several requests a step, takes blocks back."""

    def __init__(self, blocks: int, summary: MinMax) -> None:
        self.summary, self.free = summary, list(range(blocks))
        self.cache = torch.full((blocks, HEADS, summary.block, DIM), float("nan"))
        self.ledger = Ledger(summary)
        self.bounds = BlockBounds(blocks, HEADS, DIM, torch.float32, summary)
        self.tables: dict[str, list[int]] = {}
        self.lengths: dict[str, int] = {}

    def step(self, **tokens: int) -> None:
        """So many more tokens of each request, and one of padding."""
        slots = []
        for name, count in tokens.items():
            table, block = self.tables.setdefault(name, []), self.summary.block
            for at in range(self.lengths.get(name, 0), self.lengths.get(name, 0) + count):
                if at // block == len(table):
                    table.append(self.free.pop(0))
                slots.append(table[at // block] * block + at % block)
            self.lengths[name] = self.lengths.get(name, 0) + count
        self.write(torch.tensor([*slots, -1]))

    def write(self, slots: Tensor) -> None:
        keys = torch.randn(len(slots) + 3, HEADS, DIM)
        real = slots[slots >= 0]
        self.cache[real // self.summary.block, :, real % self.summary.block] = keys[: len(real)]
        self.bounds.write(keys, self.ledger.write(slots))

    def drop(self, name: str) -> None:
        self.free = self.tables.pop(name)[::-1] + self.free
        del self.lengths[name]

    def check(self, name: str) -> None:
        """Against the definition, over the keys of the request."""
        table, length, sub = torch.tensor([self.tables[name]]), self.lengths[name], self.summary.sub
        keys = self.cache[table[0]].transpose(0, 1).flatten(1, 2)[:, :length]
        rows = self.bounds.rows(table)[0]
        assert rows.shape == (HEADS, table.shape[1] * self.summary.block // sub, 2, DIM)
        for entry in range(-(-length // sub)):
            held = keys[:, entry * sub : (entry + 1) * sub]
            assert torch.equal(rows[:, entry], torch.stack((held.amin(1), held.amax(1)), 1)), (name, entry)

    def unknown(self, *names: str) -> tuple[list[int], list[int]]:
        longest = max(len(self.tables[name]) for name in names)
        table = torch.tensor([self.tables[name] + [0] * (longest - len(self.tables[name])) for name in names])
        lengths = torch.tensor([self.lengths[name] for name in names])
        blocks, tokens = self.ledger.unknown(table, lengths)
        return blocks.tolist(), tokens.tolist()


@pytest.mark.parametrize(("block", "sub"), [(8, 8), (8, 4), (16, 4), (4, 1)])
def test_bounds_are_those_of_the_keys_in_chunks_and_single_steps(block: int, sub: int) -> None:
    torch.manual_seed(0)
    engine = Engine(40, MinMax(block, sub))
    engine.step(a=11, b=3)
    engine.step(a=block * 2 + 1, c=1)
    for _ in range(block + 2):
        engine.step(a=1, b=1, c=1)
    for name in "abc":
        engine.check(name)
    assert engine.unknown("a", "b", "c") == ([], [])


def test_blocks_that_are_handed_out_again_forget_what_they_held() -> None:
    torch.manual_seed(1)
    engine = Engine(6, MinMax(8, 4))
    engine.step(a=30)
    engine.drop("a")
    engine.step(b=13, c=9)
    engine.step(b=1, c=1)
    engine.check("b")
    engine.check("c")
    assert engine.unknown("b", "c") == ([], [])


def test_a_shared_prefix_has_the_bounds_that_its_first_owner_wrote() -> None:
    torch.manual_seed(2)
    engine = Engine(12, MinMax(8, 4))
    engine.step(a=20)
    engine.tables["b"], engine.lengths["b"] = engine.tables["a"][:2], 16
    engine.step(a=3, b=5)
    engine.check("a")
    engine.check("b")
    assert engine.unknown("a", "b") == ([], [])


def test_tokens_that_were_rejected_leave_a_bound_that_still_holds() -> None:
    torch.manual_seed(3)
    engine = Engine(4, MinMax(8, 8))
    engine.step(a=6)
    engine.lengths["a"] = 4
    engine.step(a=3)
    keys = engine.cache[engine.tables["a"][0], :, :7]
    least, largest = engine.bounds.rows(torch.tensor([engine.tables["a"]]))[0, :, 0].unbind(1)
    assert (least <= keys.amin(1)).all()
    assert (largest >= keys.amax(1)).all()


def test_blocks_that_others_filled_are_found_once_and_bounded_from_the_cache() -> None:
    torch.manual_seed(4)
    engine = Engine(8, MinMax(8, 4))
    engine.tables["a"], engine.lengths["a"] = [5, 2, 7], 19
    engine.cache[torch.tensor([5, 2, 7])] = torch.randn(3, HEADS, 8, DIM)
    engine.step(a=2)
    engine.step(b=9)
    blocks, tokens = engine.unknown("a", "b")
    assert (blocks, tokens) == ([2, 5, 7], [8, 8, 5])
    engine.bounds.bound(torch.tensor(blocks), engine.cache[blocks], torch.tensor(tokens))
    engine.check("a")
    assert engine.unknown("a", "b") == ([], [])
    engine.step(a=1)
    engine.check("a")


def test_empty_sub_blocks_of_a_bounded_block_hold_nothing() -> None:
    bounds = BlockBounds(2, HEADS, DIM, torch.float32, MinMax(8, 4))
    bounds.bound(torch.tensor([1]), torch.randn(1, HEADS, 8, DIM), torch.tensor([3]))
    least, largest = bounds.rows(torch.tensor([[1]]))[0, :, 1].unbind(1)
    assert (least == float("inf")).all()
    assert (largest == float("-inf")).all()
