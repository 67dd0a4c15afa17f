"""Rows that choose: the blocks are those of `select`, and what is read through vLLM's tables is attention over them."""

from __future__ import annotations

import pytest
import torch

from hf_longctx.kernels import ops
from hf_longctx.select.choose import choose, forced
from hf_longctx.select.scorers import Look
from hf_longctx.vllm.bounds import BlockBounds
from hf_longctx.vllm.rows import decode_rows, heads_apart, most_read, rows_that_choose
from hf_longctx.vllm.settings import VARIABLE, PageChoice

HEADS, GROUP, DIM, BLOCK = 2, 3, 16, 8
LENGTHS = torch.tensor([80, 49, 63, 57])


def paged(lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values `[blocks, 2, Hkv, block, D]`, the table of each row, and rubbish in what lies beyond a row."""
    count = -(-lengths // BLOCK)
    table = torch.full((len(lengths), int(count.max()) + 2), 10_000)
    order, at = torch.randperm(int(count.sum()) + 3), 0
    for row, n in enumerate(count.tolist()):
        table[row, :n], at = order[at : at + n], at + n
    return torch.randn(len(order), 2, HEADS, BLOCK, DIM), table, order


@pytest.mark.parametrize("share", ["kv_head", "all"])
@pytest.mark.parametrize(("sink", "local"), [(4, 1), (0, 1), (9, 12)])
def test_a_step_reads_the_blocks_that_the_reference_chooses(share: str, sink: int, local: int) -> None:
    torch.manual_seed(5)
    selector = PageChoice(48, 4, 0, share, sink, local).selector(BLOCK)  # type: ignore[arg-type]
    summary = selector.scorer.summary  # type: ignore[attr-defined]
    cache, table, _ = paged(LENGTHS)
    bounds = BlockBounds(len(cache), HEADS, DIM, torch.float32, summary)
    bounds.bound(torch.arange(len(cache)), cache[:, 0], torch.full((len(cache),), BLOCK))
    every = torch.arange(len(LENGTHS))
    rows = decode_rows(selector, every, torch.arange(len(LENGTHS) + 1), LENGTHS, table)
    assert rows.tokens is None
    q = torch.randn(len(LENGTHS), HEADS * GROUP, DIM)
    read = rows.choose(q, bounds.rows(rows.table))
    assert read.shape == (len(LENGTHS), HEADS if share == "kv_head" else 1, 6)

    for row, length in enumerate(LENGTHS.tolist()):
        own = cache[table[row, : -(-length // BLOCK)]].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, None, :, :length]
        keys, values = own.transpose(1, 2).flatten(1, 2).view(2, 1, HEADS, length, DIM)
        padded = torch.nn.functional.pad(keys, (0, 0, 0, -length % 4))
        filled = torch.arange(padded.shape[2]) < length
        known = summary.fold(padded.unflatten(2, (-1, 4)), filled.view(1, 1, -1, 4), None)
        q_pos = torch.tensor([[length - 1]])
        near = forced(selector, q_pos, 1)
        look = Look(q[row, None, :, None], q_pos, keys, known, 1, 1.0, share, None, near[0])
        ids = choose(selector, look, near)
        assert (ids >= 0).all()
        assert torch.equal(table[row][ids[0, :, 0].long()], read[row])

        see = ops.Visibility(q_pos=q_pos)
        logits, chosen = ops.Logits(DIM**-0.5), ops.Selection(ids, BLOCK, 1)
        expected = ops.attend_pages(look.q, keys, values, logits, see, None, chosen)[0, :, 0]
        got = through_tables(q[row], cache, read[row].expand(HEADS, -1), int(rows.read[row]))
        torch.testing.assert_close(got, expected)


def through_tables(q: torch.Tensor, cache: torch.Tensor, blocks: torch.Tensor, tokens: int) -> torch.Tensor:
    """What a kernel with one table a row makes of a cache whose heads are blocks: `[Hq, D]`."""
    apart = cache.transpose(1, 2).flatten(0, 1)
    out = []
    for part, table in zip(q.unflatten(0, (HEADS, GROUP)), heads_apart(blocks[None], HEADS), strict=True):
        keys, values = apart[table.long()].transpose(0, 1).flatten(1, 2)[:, :tokens]
        out.append((part @ keys.T * DIM**-0.5).softmax(-1) @ values)
    return torch.cat(out)


def test_only_single_steps_beyond_the_budget_choose() -> None:
    selector = PageChoice(40, 8, 0).selector(BLOCK)
    assert most_read(selector) == 40
    starts = torch.tensor([0, 1, 2, 5, 6, 7])
    lengths = torch.tensor([41, 40, 90, 200, 200])
    prompt = torch.tensor([False, False, False, True, False])
    assert rows_that_choose(selector, starts, lengths, prompt).tolist() == [0, 4]


def test_rows_among_others_know_where_their_queries_stand() -> None:
    selector = PageChoice(24, 8, 0).selector(BLOCK)
    table = torch.arange(50).view(5, 10)
    rows = decode_rows(selector, torch.tensor([1, 4]), torch.tensor([0, 3, 4, 9, 10, 11]), torch.full((5,), 30), table)
    assert rows.tokens is not None
    assert rows.tokens.tolist() == [3, 10]
    assert rows.table.tolist() == [[10, 11, 12, 13], [40, 41, 42, 43]]


@pytest.mark.parametrize("length", range(41, 58))
def test_as_many_tokens_are_read_as_the_chosen_blocks_hold(length: int) -> None:
    selector = PageChoice(40, 8, 0).selector(BLOCK)
    table = torch.arange(8)[None]
    rows = decode_rows(selector, torch.tensor([0]), torch.tensor([0, 1]), torch.tensor([length]), table)
    last = -(-length // BLOCK) - 1
    assert rows.read.tolist() == [4 * BLOCK + length - last * BLOCK]
    assert rows.read.dtype == torch.int32


def test_the_variable_takes_knobs_and_refuses_what_makes_no_sense() -> None:
    assert PageChoice.read("{}") == PageChoice()
    assert PageChoice.read('{"token_budget": 1024, "share": "all"}') == PageChoice(1024, share="all")
    for text in ("", "[]", "1024", '{"budget": 1024}', "{"):
        with pytest.raises(ValueError, match=f"{VARIABLE}: expected a JSON object"):
            PageChoice.read(text)
    for text in ('{"token_budget": 1.5}', '{"share": "q_head"}', '{"dense_layers": -1}', '{"sub": 0}'):
        with pytest.raises(ValueError, match=f"{VARIABLE}: expected"):
            PageChoice.read(text)
    with pytest.raises(ValueError, match="whole pages of 128"):
        PageChoice(1000).selector(128)
    with pytest.raises(ValueError, match="divides the block"):
        PageChoice(1024, sub=24).selector(32)
