"""Rows that choose: the blocks are those of `select`, and what is read through vLLM's tables is attention over them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_longctx.errors import UnsupportedError
from hf_longctx.heads import HeadPattern, save_pattern
from hf_longctx.kernels import ops
from hf_longctx.select.choose import choose, forced
from hf_longctx.select.scorers import Look
from hf_longctx.vllm.bounds import BlockBounds
from hf_longctx.vllm.rows import DecodeRows, decode_rows, lengths_apart, most_read, rows_that_choose, tables_apart
from hf_longctx.vllm.settings import Ends, HeadChoice, PageChoice, asked

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
        got = through_tables(q, cache, rows, (True,) * HEADS, None, read)[row]
        torch.testing.assert_close(got, expected)


def through_tables(
    q: torch.Tensor, cache: torch.Tensor, rows: DecodeRows, roles: tuple[bool, ...], ends: Ends | None, read: Any
) -> torch.Tensor:
    """What a kernel with one table a row makes of a cache whose heads are blocks: `[R, Hq, D]`."""
    apart = cache.transpose(1, 2).flatten(0, 1)
    tables, lengths = tables_apart(rows, roles, ends, read), lengths_apart(rows, roles, ends)
    assert tables.dtype == lengths.dtype == torch.int32
    out = []
    for part, table, tokens in zip(q.reshape(-1, GROUP, DIM), tables.long(), lengths, strict=True):
        keys, values = apart[table].transpose(0, 1).flatten(1, 2)[:, :tokens]
        out.append((part @ keys.T * DIM**-0.5).softmax(-1) @ values)
    return torch.cat(out).view(len(q), -1, DIM)


@pytest.mark.parametrize("roles", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("sinks", "window"), [(8, 16), (0, 1), (3, 9), (40, 64)])
def test_streaming_heads_read_both_ends(roles: tuple[bool, bool], sinks: int, window: int) -> None:
    torch.manual_seed(6)
    choice = HeadChoice(48, 4, sinks=sinks, window=window)
    selector, ends = choice.selector(BLOCK), choice.ends(BLOCK)
    lengths = torch.tensor([80, 49, 63, 9])  # the last two: some heads read all they have, or every head does
    cache, table, _ = paged(lengths)
    every = torch.arange(len(lengths))
    rows = decode_rows(selector, every, torch.arange(len(lengths) + 1), lengths, table)
    q = torch.randn(len(lengths), HEADS * GROUP, DIM)
    bounds = BlockBounds(len(cache), sum(roles), DIM, torch.float32, choice.summary(BLOCK))
    own, chosen = torch.tensor(roles), None
    if any(roles):
        bounds.bound(torch.arange(len(cache)), cache[:, 0, own], torch.full((len(cache),), BLOCK))
        chosen = rows.choose(q.view(-1, HEADS, GROUP, DIM)[:, own].flatten(1, 2), bounds.rows(rows.table))
    got = through_tables(q, cache, rows, roles, ends, chosen).view(-1, HEADS, GROUP, DIM)
    for row, length in enumerate(lengths.tolist()):
        count = -(-length // BLOCK)
        own_blocks = cache[table[row, :count].long()].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :length]
        for head, retrieves in enumerate(roles):
            # a window of any query of a block, so of its last one at worst: it touches one block more than it fills
            first, last = -(-sinks // BLOCK), 1 + -(-(window - 1) // BLOCK)
            seen = [block for block in range(count) if block < first or block >= count - last]
            if retrieves:
                seen = [table[row].tolist().index(x) for x in chosen[row, 0, : min(count, 6)].tolist()]  # type: ignore[index]
                assert len(set(seen)) == min(count, 6)
                assert seen[-1] == count - 1
            at = torch.cat([torch.arange(block * BLOCK, min(length, (block + 1) * BLOCK)) for block in seen])
            keys, values = own_blocks[:, head, at]
            expected = (q.view(-1, HEADS, GROUP, DIM)[row, head] @ keys.T * DIM**-0.5).softmax(-1) @ values
            torch.testing.assert_close(got[row, head], expected)


@pytest.mark.parametrize("length", range(16, 41))
def test_sinks_and_window_are_among_the_blocks_of_both_ends(length: int) -> None:
    choice = HeadChoice(32, 8, sinks=3, window=10)
    rows = DecodeRows(None, torch.arange(5)[None], torch.tensor([length]), choice.selector(BLOCK))
    blocks = rows.at_ends(choice.ends(BLOCK))[0].tolist()
    wanted = {at // BLOCK for at in (*range(3), *range(length - 10, length))}
    assert wanted <= set(blocks[: -(-length // BLOCK)])
    assert len(blocks) == 4


def test_only_single_steps_beyond_the_budget_choose() -> None:
    selector = PageChoice(40, 8, 0).selector(BLOCK)
    assert most_read(selector) == 40
    starts = torch.tensor([0, 1, 2, 5, 6, 7])
    lengths = torch.tensor([41, 40, 90, 200, 200])
    prompt = torch.tensor([False, False, False, True, False])
    assert rows_that_choose(selector, None, starts, lengths, prompt).tolist() == [0, 4]
    assert rows_that_choose(selector, Ends(1, 3), starts, lengths, prompt).tolist() == [0, 1, 4]


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
    assert rows.read(5).tolist() == [4 * BLOCK + length - last * BLOCK]
    assert rows.read(8).tolist() == [length]


@pytest.mark.parametrize("kind", [PageChoice, HeadChoice])
def test_a_variable_takes_knobs_and_refuses_what_makes_no_sense(kind: type[PageChoice]) -> None:
    assert kind.read("{}") == kind()
    assert kind.read('{"token_budget": 1024, "share": "all"}') == kind(1024, share="all")
    for text in ("", "[]", "1024", '{"budget": 1024}', "{"):
        with pytest.raises(ValueError, match=f"{kind.variable}: expected a JSON object"):
            kind.read(text)
    for text in ('{"token_budget": 1.5}', '{"share": "q_head"}', '{"dense_layers": -1}', '{"sub": 0}'):
        with pytest.raises(ValueError, match=f"{kind.variable}: expected"):
            kind.read(text)
    with pytest.raises(ValueError, match=f"{kind.variable}: expected token_budget as whole pages of 128"):
        kind(1000).selector(128)
    with pytest.raises(ValueError, match="divides the block"):
        kind(1024, sub=24).selector(32)


@pytest.mark.parametrize(
    "text", ['{"sparsity": 1.5}', '{"sparsity": "half"}', '{"pattern": [[0.5]]}', '{"sinks": -1}', '{"window": 0}']
)
def test_knobs_of_heads_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"{HeadChoice.variable}[:,].* expected"):
        HeadChoice.read(text)


def test_one_variable_decides() -> None:
    pages, heads = PageChoice.variable, HeadChoice.variable
    assert asked({}) is None
    assert asked({pages: "{}"}) == PageChoice()
    assert asked({heads: '{"sparsity": 0.25}'}) == HeadChoice(sparsity=0.25)
    with pytest.raises(ValueError, match=f"expected one of {pages} and {heads}; got both"):
        asked({pages: "{}", heads: "{}"})


def test_roles_come_from_a_pattern_that_fits(tmp_path: Path) -> None:
    config = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, model_type="llama")
    save_pattern(HeadPattern("mine", ((0.9, 0.1), (0.2, 0.8))), tmp_path / "p")
    mine = HeadChoice(pattern=str(tmp_path / "p"))
    assert mine.roles(config, "somebody/model", 2) == ((True, False), (False, True))
    assert HeadChoice(pattern=mine.pattern, sparsity=0).roles(config, "", 2) == ((True, True), (True, True))
    assert PageChoice().roles(config, "", 2) == ((True, True), (True, True))
    assert PageChoice().ends(32) is None
    with pytest.raises(UnsupportedError, match="expected a published head pattern for somebody/model"):
        HeadChoice().roles(config, "somebody/model", 2)
    with pytest.raises(ValueError, match="expected 4 KV heads"):
        mine.roles(config, "", 4)
