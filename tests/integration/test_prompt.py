"""`generate()` with a prompt whose blocks of queries share a choice: its last tokens choose for themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_longctx as lc
from hf_longctx import memory, prompt
from hf_longctx.cache.cache import LongContextCache
from hf_longctx.cache.rows import Rows
from hf_longctx.kernels.ops import Selection
from hf_longctx.patch import state_of

from ..methods.cases import gates
from .again import recorders
from .cases import BY_NAME

INF = {"init": 4, "local": 8, "block": 4, "topk": 1, "representatives": 2, "q_block": 16, "offload": False}


@pytest.mark.parametrize(("chunk", "padded"), [(None, False), (16, False), (None, True)])
def test_generate_reads_the_last_tokens_apart(chunk: int | None, padded: bool) -> None:
    model = BY_NAME["llama"].make()
    ids = BY_NAME["llama"].prompt(48, rows=2)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
    lc.patch(model, "inf_llm", **INF)
    with torch.no_grad():
        cache = model(ids[:, :16], attention_mask=mask[:, :16], use_cache=True).past_key_values
        for end in (24, 32, 40, 48):
            said = model(ids[:, end - 8 : end], attention_mask=mask[:, :end], past_key_values=cache)
        last = said.logits[:, -1]
        together = model(ids, attention_mask=mask).logits[:, -1]
    assert not torch.allclose(last, together)  # else this shows nothing
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=2,
        do_sample=False,
        prefill_chunk_size=chunk,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    torch.testing.assert_close(out.logits[0], last.float(), rtol=1e-4, atol=1e-5)
    assert out.past_key_values.get_seq_length() == 49


@pytest.mark.parametrize("method", ["dense", "streaming_llm", "xattention", "inf_llm"])
def test_a_long_prompt_is_read_in_pieces(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = BY_NAME["llama"].make(), BY_NAME["llama"].prompt(75, rows=2)
    mask = torch.ones_like(ids)
    mask[0, :26] = 0  # all of the first piece, and more
    lc.patch(model, method, **(INF if method == "inf_llm" else {}))
    calls: list[int] = []
    model.model.register_forward_pre_hook(lambda *a: calls.append(a[2]["input_ids"].shape[1]), with_kwargs=True)
    expected = said(model, ids, mask)
    whole = calls[: calls.index(1)]
    monkeypatch.setattr(prompt, "PIECE", 48)
    calls.clear()
    torch.testing.assert_close(said(model, ids, mask), expected, rtol=1e-4, atol=1e-5)
    apart = [48, 27, 48, 27]  # row by row, where stores hold keys and values alone
    pieces = {"inf_llm": [24, 19, *whole[1:]], "streaming_llm": [24, 24, 24, 3]}
    assert calls[: calls.index(1)] == pieces.get(method, apart)
    calls.clear()
    torch.testing.assert_close(said(model, ids, mask, prefill_chunk_size=75), expected, rtol=1e-4, atol=1e-5)
    assert calls[: calls.index(1)] == whole


@pytest.mark.parametrize("kv", ["native", "int4"])
@pytest.mark.parametrize("padded", [False, True])
def test_rows_that_are_read_apart_stand_together(kv: str, padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is what one call would have made, and one memory; the rows go on from there together."""
    model, ids = BY_NAME["llama"].make(), BY_NAME["llama"].prompt(30, rows=5)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :7] = 0  # the first two rows are one call
        mask[4, :12] = 0
    lc.patch(model, "dense", kv=kv)
    calls: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(lambda *a: calls.append(a[2]["input_ids"].shape), with_kwargs=True)
    settings: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    settings |= {"pad_token_id": 0, "output_logits": True, "return_dict_in_generate": True}
    whole = model.generate(ids, **settings)
    assert calls == [(5, 30), *[(5, 1)] * 3]
    monkeypatch.setattr(prompt, "PIECE", 75)
    calls.clear()
    apart = model.generate(ids, **settings)
    assert calls == [(2, 30), (2, 30), (1, 30), *[(5, 1)] * 3]
    torch.testing.assert_close(torch.stack(apart.logits), torch.stack(whole.logits), rtol=1e-4, atol=1e-5)
    ledgers = [out.past_key_values.ledger for out in (whole, apart)]
    for name in ("rows", "columns", "kv_bytes", "loose"):
        assert len({getattr(ledger, name) for ledger in ledgers}) == 1
    for name in ("lengths", "tail"):
        one, other = (getattr(ledger, name) for ledger in ledgers)
        assert (one is None and other is None) or torch.equal(one, other)
    assert lc.report(model).kv_bytes == ledgers[1].kv_bytes
    apart.past_key_values.crop(-2)
    assert apart.past_key_values.get_seq_length() == 31


@pytest.mark.parametrize("kv", ["native", "int4"])
def test_room_is_made_before_anything_is_computed(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the configuration says; and anew, where the model makes keys of another kind."""
    model, ids = lc.patch(BY_NAME["llama"].make(), "dense", kv=kv), BY_NAME["llama"].prompt(30, rows=3)
    monkeypatch.setattr(prompt, "PIECE", 30)
    made: list[tuple[int, ...]] = []
    before, own = Rows.begin, prompt.begin

    def noted(rows: Rows, x: torch.Tensor, slots: int) -> None:
        had = rows.data
        before(rows, x, slots)
        if rows.data is not had:
            made.append((*x.shape[:2], slots, x.shape[3]))

    monkeypatch.setattr(Rows, "begin", noted)
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    layers = model.config.num_hidden_layers
    assert made == [(3, 2, 64, model.config.head_dim)] * 2 * layers
    made.clear()
    monkeypatch.setattr(prompt, "begin", lambda cache, rows, like: own(cache, rows, [x[..., :8] for x in like]))
    assert torch.equal(model.generate(ids, **settings), expected)
    assert [x[3] for x in made] == [8] * 2 * layers + [model.config.head_dim] * 2 * layers


def test_a_prompt_that_goes_on_is_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = lc.patch(BY_NAME["llama"].make(), "dense"), BY_NAME["llama"].prompt(60, rows=2)
    cache = model(ids[:, :30], use_cache=True).past_key_values
    calls: list[tuple[int, ...]] = []
    model.model.register_forward_pre_hook(lambda *a: calls.append(a[2]["input_ids"].shape), with_kwargs=True)
    monkeypatch.setattr(prompt, "PIECE", 45)
    model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert {rows for rows, _ in calls} == {2}


def test_a_cache_of_which_rows_were_not_read_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = lc.patch(BY_NAME["llama"].make(), "dense"), BY_NAME["llama"].prompt(30, rows=3)
    cache, calls = LongContextCache(lc.report(model).plan), [0]
    monkeypatch.setattr(prompt, "PIECE", 45)

    def fail(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(fail)
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, past_key_values=cache, **settings)
    hook.remove()
    assert (cache.get_seq_length(), cache.kv_bytes) == (0, 0)
    got = model.generate(ids[:2], past_key_values=cache, **settings)
    assert torch.equal(got, model.generate(ids[:2], **settings))


def test_more_rows_than_there_is_memory_for_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = lc.patch(BY_NAME["llama"].make(), "dense"), BY_NAME["llama"].prompt(1100, rows=3)
    calls: list[int] = []
    model.model.register_forward_pre_hook(lambda *a: calls.append(1), with_kwargs=True)
    monkeypatch.setattr(prompt, "PIECE", 1100)
    monkeypatch.setattr(memory, "available_bytes", lambda _: 1 << 20)
    with pytest.raises(MemoryError, match="of 1100 tokens under plan 'dense'"):
        model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert not calls


@pytest.mark.parametrize("method", ["dense", "quest", "lserve"])
def test_stores_grow_once_for_a_prompt_in_pieces(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = BY_NAME["llama"].make(), BY_NAME["llama"].prompt(500)
    lc.patch(model, method, **({"pattern": gates(BY_NAME["llama"])} if method == "lserve" else {}))
    grown: list[int] = []

    def counted(make: Any) -> Any:
        def run(rows: Rows, like: Any, slots: int, *heads: int | None) -> None:
            before = rows.data
            make(rows, like, slots, *heads)
            if rows.data is not before:
                grown.append(id(rows))

        return run

    for name in ("begin", "reserve"):
        monkeypatch.setattr(Rows, name, counted(getattr(Rows, name)))
    monkeypatch.setattr(prompt, "PIECE", 64)
    model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert grown
    assert len(grown) == len(set(grown))


@pytest.mark.parametrize(("new", "slots"), [(200, 320), (9, 128), (1000, 512)])
def test_there_is_room_for_the_answer_at_once(new: int, slots: int) -> None:
    """Where steps are recorded: as much as was asked for, but no more than the first recorded step would want."""
    model, ids = lc.patch(BY_NAME["llama"].make(), "dense"), BY_NAME["llama"].prompt(100, rows=2)
    seen: list[Any] = []

    def look(*_: Any) -> None:
        state = state_of(model)
        cache = None if state is None or state.cache is None else state.cache()
        assert cache is not None
        seen.append(cache.stacks[0].stores[0][1].k)

    model.model.layers[1].register_forward_hook(look)
    with recorders():
        stop: Any = [lambda ids, _: torch.full((2,), ids.shape[1] == 104)]
        model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0, stopping_criteria=stop)
    assert seen[0].shape[2] == slots
    assert all(x is seen[0] for x in seen)


def said(model: Any, ids: torch.Tensor, mask: torch.Tensor, **knobs: Any) -> torch.Tensor:
    """Logits of two new tokens."""
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=2,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **knobs,
    )
    return torch.stack(out.logits)


def test_a_short_prompt_is_one_call_and_unpatch_leaves_nothing() -> None:
    model = BY_NAME["llama"].make()
    calls: list[int] = []
    model.model.register_forward_pre_hook(lambda *a: calls.append(a[2]["input_ids"].shape[1]), with_kwargs=True)
    for method, knobs, wanted in (
        ("inf_llm", INF, [9]),
        ("dense", {}, [90]),
        ("xattention", {}, [90]),
        ("inf_llm", INF, [58, 8, 8, 8, 8]),
    ):
        lc.patch(model, method, **knobs)
        calls.clear()
        size = sum(wanted)
        model.generate(BY_NAME["llama"].prompt(size), max_new_tokens=1, do_sample=False, pad_token_id=0)
        assert calls == wanted
    lc.unpatch(model)
    assert "_prefill" not in vars(model)


@pytest.mark.parametrize("piece", [prompt.PIECE, 48])
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_with_the_last_tokens_read_everything(padded: bool, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where keys themselves are scored; of each row, and no other block does."""
    monkeypatch.setattr(prompt, "PIECE", piece)
    model, ids = BY_NAME["llama"].make(), BY_NAME["llama"].prompt(100, rows=2)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :21] = 0
    lc.patch(model, "xattention", stride=4, tau=0.05, block=8, dense_below=0)
    state, whole = state_of(model), set()
    assert state is not None

    def watch(layer: int, group: lc.HeadGroup, selector: lc.Selector, q_pos: torch.Tensor, found: Selection) -> None:
        last = q_pos.view(len(q_pos), -1, 8).amax(-1).expand(2, -1)
        for row, head, n in (found.ids >= 0).any(-1).nonzero().tolist():
            end = int(last[row, n])
            whole.add((row, end, bool((found.ids[row, head, n] >= 0).sum() == end // 8 + 1)))

    state.watch = watch
    model.generate(ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0)
    for row, length in enumerate(mask.sum(1).tolist()):
        first = (length - 32) // 8 * 8
        late = {every for own, end, every in whole if own == row and end >= first}
        early = {every for own, end, every in whole if own == row and 24 < end < first}
        assert late == {True}
        assert False in early
        assert (row, first - 1, True) not in whole or (row, first - 1, False) in whole
