"""A cache that went through a file is the cache that was saved; a file that is not whole, or another's, is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import hf_longctx as lc
from hf_longctx import load_session, save_session
from hf_longctx.cache import session as parts_of
from hf_longctx.cache.kv_format import Int4KV, Int8KV
from hf_longctx.cache.placement import HostLRU
from hf_longctx.cache.rows import decoded
from hf_longctx.plan import Selector
from hf_longctx.select.budgets import TopK
from hf_longctx.select.scorers import RepresentativeDot, UpperBound
from hf_longctx.select.summaries import MinMax, Representatives
from hf_longctx.testing import tiny_llama

from .vectors import CPU, Text, assert_reads, change, reals

MODEL = tiny_llama()
IDS = torch.randint(8, 64, (2, 60), generator=torch.Generator().manual_seed(0))
BOUNDS = Selector(UpperBound(MinMax(4, 2)), TopK(8), sink=2, local=2)
MARKS = Selector(RepresentativeDot(Representatives(4, 2), 90), TopK(8), sink=2, local=6)
KEEP, HERE = lc.KeepAll(), lc.Absolute()
POLICIES = {
    "dense": lc.HeadPolicy(KEEP, HERE),
    "int8": lc.HeadPolicy(KEEP, HERE, kv=Int8KV()),
    "recent-int4": lc.HeadPolicy(KEEP, HERE, kv=Int4KV(recent=7)),
    "window-int4": lc.HeadPolicy(lc.SinkWindow(2, 9, 14), HERE, kv=Int4KV()),
    "host": lc.HeadPolicy(KEEP, HERE, decode=BOUNDS, placement=HostLRU(2)),
    "host-int8": lc.HeadPolicy(KEEP, HERE, decode=BOUNDS, kv=Int8KV(), placement=HostLRU(2)),
}


def plan_of(policy: lc.HeadPolicy) -> lc.Plan:
    return lc.Plan("test", (lc.LayerPlan((lc.HeadGroup((1,), policy), lc.HeadGroup((0,), POLICIES["dense"]))),) * 2)


METHODS: dict[str, Any] = {
    **{name: plan_of(policy) for name, policy in POLICIES.items()},
    "streaming": lc.StreamingLLM(sinks=2, window=6),
}


@torch.no_grad()
def go_on(cache: Any, mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Logits of some calls after 40 columns."""
    out = []
    for first, last in ((40, 41), (41, 47), (47, 48), (48, 60)):
        seen = None if mask is None else mask[:, :last]
        out.append(MODEL(IDS[:, first:last], attention_mask=seen, past_key_values=cache).logits)
    return out


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@pytest.mark.parametrize("method", METHODS)
def test_going_on_from_the_file_is_going_on_from_the_cache(method: str, padded: bool, tmp_path: Path) -> None:
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :5] = 0
    path, used = tmp_path / "chat.safetensors", mask if padded else None
    with lc.patched(MODEL, METHODS[method]), torch.no_grad():
        first = None if used is None else used[:, :33]
        cache = MODEL(IDS[:, :33], attention_mask=first, use_cache=True).past_key_values
        cache.activate_past_recording()
        MODEL(IDS[:, 33:43], attention_mask=None if used is None else used[:, :43], past_key_values=cache)
        cache.crop(-3)
        if method == "streaming":
            lc.evict(cache, 2)
        save_session(MODEL, path)
        again = load_session(MODEL, path)
        for name in ("columns", "rows", "kv_bytes", "host_bytes", "stored"):
            assert getattr(again.ledger, name) == getattr(cache.ledger, name), name
        live, read = go_on(cache, used), go_on(again, used)
        assert all(map(torch.equal, live, read))
        again.crop(-20)
        cache.crop(-20)
        assert all(map(torch.equal, go_on(cache, used), live))
        assert all(map(torch.equal, go_on(again, used), live))
    assert [file.name for file in tmp_path.iterdir()] == ["chat.safetensors"]


@pytest.mark.parametrize("padded", [False, True], ids=["even", "padded"])
@settings(max_examples=30)
@given(
    data=st.data(),
    kv=st.sampled_from([None, Int8KV(), Int4KV()]),
    placement=st.sampled_from([None, HostLRU(2)]),
    local=st.booleans(),
)
def test_stores_and_their_indexes_are_put_together_again(
    padded: bool, data: st.DataObject, kv: Any, placement: Any, local: bool
) -> None:
    policy = lc.HeadPolicy(KEEP, HERE, MARKS if local else None, MARKS if local else BOUNDS, kv, placement)
    text, twin = Text(policy, rows=2), Text(policy, rows=2)
    for call in range(data.draw(st.integers(2, 6))):
        step, k, v = text.draw(data.draw(reals(len(text.keys), padded, 90)))
        stores = [text.store] if call == 0 else [text.store, twin.store]
        views = [store.append(k, v, step) for store in stores]
        for view in views:
            assert_reads(text, view, step)
        if local:
            ids = torch.arange(-(-(step.columns + step.tokens) // 4), dtype=torch.int32).view(1, 1, 1, -1)
            mass = torch.rand(len(text.keys), 2, 1, ids.numel() * 4, generator=text.random)
            place = torch.arange(ids.numel() * 4)
            near = (place > step.lengths.view(-1, 1, 1, 1) - 6) & (place < step.lengths_after.view(-1, 1, 1, 1))
            for store in stores:
                store.add_mass(ids.expand(len(text.keys), -1, -1, -1), mass * near, 4)
        assert all(torch.equal(store.summaries, text.store.summaries) for store in stores)
        text.cache.commit(step)
        change(text, data, crops=not local)
        tensors, values = parts_of.take_apart(text.cache)
        twin.cache = parts_of.put_together(text.cache.plan, tensors, json.loads(json.dumps(values)), [CPU])
        assert twin.cache.kv_bytes == text.cache.kv_bytes
        assert twin.cache.host_bytes <= text.cache.host_bytes  # a crop or a choice of rows frees no segment
    lengths = torch.tensor([len(tokens) for tokens in text.keys])
    both = (x.store.whole(lengths, text.cache.ledger.columns) for x in (text, twin))
    for one, other in zip(*both, strict=True):
        for row, tokens in enumerate(text.keys):
            assert torch.equal(decoded(one)[row, :, : len(tokens)], decoded(other)[row, :, : len(tokens)])


def test_what_was_taken_back_whole_is_put_together_again() -> None:
    policy = lc.HeadPolicy(KEEP, HERE, None, BOUNDS, None, HostLRU(2))
    text, twin = Text(policy, rows=2), Text(policy, rows=2)
    step, k, v = text.draw(torch.ones(2, 1, dtype=torch.bool))
    text.store.append(k, v, step)
    text.cache.commit(step)
    text.crop(1)
    twin.cache = parts_of.put_together(text.cache.plan, *parts_of.take_apart(text.cache), [CPU])
    step, k, v = text.draw(torch.ones(2, 3, dtype=torch.bool))
    for store in (text.store, twin.store):
        assert_reads(text, store.append(k, v, step), step)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "chat.safetensors"
    with lc.patched(MODEL, "dense"), torch.no_grad():
        cache = MODEL(IDS[:, :33], use_cache=True).past_key_values
        save_session(MODEL, path, cache)
    return path


def refuses(path: Path, match: str, model: Any = MODEL) -> None:
    with lc.patched(model, "dense"), pytest.raises(ValueError, match=match):
        load_session(model, path)


def test_a_file_that_was_cut_short_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    for size in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        saved.write_bytes(whole[:size])
        refuses(saved, "damaged or cut short")


def test_a_file_that_was_changed_anywhere_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    for place in [*range(0, len(whole), len(whole) // 150), len(whole) - 1]:
        changed = bytearray(whole)
        changed[place] ^= 1
        saved.write_bytes(changed)
        refuses(saved, "load_session: expected")
    saved.write_bytes(whole)
    with lc.patched(MODEL, "dense"):
        assert load_session(MODEL, saved).get_seq_length() == 33


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"x": torch.zeros(3)}, path)
    refuses(path, r"expected a file written by save_session; got '.*weights\.safetensors', which is none")
    with lc.patched(MODEL, "dense"), pytest.raises(FileNotFoundError):
        load_session(MODEL, tmp_path / "nothing")


def test_a_session_of_another_model_is_refused(saved: Path) -> None:
    refuses(saved, r"with layers \[\[4, 2, 16, null\].*; got \[\[4, 2, 8, null\]", tiny_llama(head_dim=16))
    refuses(saved, r"with dtype torch\.bfloat16; got torch\.float32 in '.*chat", tiny_llama().bfloat16())
    refuses(saved, r"with vocabulary 65; got 64", tiny_llama(vocab_size=65))


def test_a_session_of_another_plan_is_refused(saved: Path) -> None:
    match = r"plan in force, 'streaming_llm'; got one of 'dense' .*Patch the model with that plan:\ndense: 2 attention"
    with lc.patched(MODEL, "streaming_llm"), pytest.raises(ValueError, match=match):
        load_session(MODEL, saved)


def test_what_cannot_be_saved_is_said_and_the_old_file_stays(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = saved.read_bytes()
    with pytest.raises(ValueError, match="save_session: expected a patched model"):
        save_session(MODEL, saved)
    with lc.patched(MODEL, "dense"), torch.no_grad():
        with pytest.raises(ValueError, match=r"expected a cache of plan 'dense' that has seen tokens; got none"):
            save_session(MODEL, saved)
        cache = MODEL(IDS[:, :5], use_cache=True).past_key_values
        cache.begin(1, 2, CPU, None)
        with pytest.raises(RuntimeError, match="got one that was interrupted"):
            save_session(MODEL, saved, cache)
        cache.ledger.begun = False

        def fail(*args: Any, **kwargs: Any) -> None:
            raise OSError("no space left")

        monkeypatch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="no space left"):
            save_session(MODEL, saved, cache)
    assert saved.read_bytes() == whole
    assert [file.name for file in saved.parent.iterdir()] == ["chat.safetensors"]
