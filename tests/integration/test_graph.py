"""Recorded decode steps give what the same calls give as they are: every family, every method that can be recorded."""

from __future__ import annotations

import copy
import pickle
import tempfile
from typing import Any, ClassVar

import pytest
import torch

import hf_longctx as lc
from hf_longctx import recording
from hf_longctx.cache import host
from hf_longctx.cache.cache import LongContextCache
from hf_longctx.methods import compose
from hf_longctx.models import inspect_model

from ..methods.cases import DECODERS, LIMITS, LOSSY, SELECTING, Row, named, pairs
from .again import Again, recorders
from .cases import BY_NAME
from .test_generate import batch, generate, single
from .tiny import Case

LLAMA = BY_NAME["llama"]
QUEST, _, LSERVE, INF_LLM, BY_ATTENTION = SELECTING
STORED = (
    Row("quest_all", lambda case: lc.Quest(8, page=4, sink=0, dense_layers=0, share="all")),
    Row("quest_dense_below", lambda case: lc.Quest(8, page=4, sink=0, dense_layers=0, dense_below=45)),
)
INF = {"init": 4, "local": 6, "block": 4, "topk": 1, "representatives": 2, "q_block": 8}
FILES = Row("files", lambda case: lc.InfLLM(**INF, disk=tempfile.gettempdir()), in_cache=True)
PLACED = (
    INF_LLM,
    BY_ATTENTION,
    Row("inf_llm_int8", lambda case: lc.InfLLM(**INF, resident_blocks=0, kv="int8"), in_cache=True),
    Row("inf_llm_on_device", lambda case: lc.InfLLM(**INF, offload=False), in_cache=True),
    Row("quest_host", lambda case: _hosted(case, lc.Quest(8, page=4, sink=0, dense_layers=0))),
    Row("quest_host_dense_first", lambda case: _hosted(case, lc.Quest(40, page=4, dense_layers=0))),
)
PAIRS = [
    *pairs((LIMITS[0], *LOSSY, LSERVE)),
    *pairs((QUEST, *STORED, *PLACED), tuple(BY_NAME[n] for n in ("llama", "gemma3"))),
]
CHANGING = [case for case in DECODERS if case.rope in ("dynamic", "longrope")]


def _hosted(case: Case, method: Any) -> lc.Plan:
    """A method that selects, with blocks in host memory."""
    return compose(inspect_model(case.build()), decode=method, placement=lc.HostLRU(3))


def both(row: Row, case: Case, inputs: Any, **options: Any) -> tuple[Any, Any]:
    """What `generate` gives with recorded steps, and without; on two models, as some remember the longest text."""
    recorded, plain = (lc.patch(case.make(), row.method(case), cuda_graph=on) for on in (True, False))
    return tuple(generate(model, inputs, output_logits=True, **options) for model in (recorded, plain))


def assert_same(recorded: Any, plain: Any) -> None:
    assert torch.equal(recorded.sequences, plain.sequences)
    for a, b in zip(recorded.logits, plain.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.fixture(autouse=True)
def _little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "ROOM", 8)  # so that a few steps run into the end of it
    monkeypatch.setattr(host, "SEGMENT", 12)


@pytest.mark.parametrize(("row", "case"), PAIRS, ids=named)
def test_padded_batch(row: Row, case: Case) -> None:
    with recorders() as again:
        assert_same(*both(row, case, batch(case)))
    assert again.replayed >= 6 if case not in CHANGING else again.replayed == 0


@pytest.mark.parametrize("row", [LIMITS[0], *LOSSY, QUEST, LSERVE, *STORED, *PLACED], ids=named)
@pytest.mark.parametrize(
    "options", [{"do_sample": True, "temperature": 0.7}, {"num_beams": 3}, {"max_new_tokens": 30}], ids=str
)
def test_one_row(row: Row, options: dict[str, Any]) -> None:
    with recorders() as again:
        assert_same(*both(row, LLAMA, single(LLAMA), **options))
    assert again.replayed > 5
    assert again.recorded < again.replayed


@pytest.mark.parametrize("knobs", [{"kv": "int8"}, {"kv": "int4"}, {"method": "quest", "kv": "int8"}], ids=str)
def test_quantized(knobs: dict[str, Any]) -> None:
    recorded, plain = (lc.patch(LLAMA.make(), **{"method": "dense", **knobs}, cuda_graph=on) for on in (True, False))
    with recorders() as again:
        assert_same(*(generate(model, batch(LLAMA), output_logits=True) for model in (recorded, plain)))
    assert again.replayed > 5


@torch.no_grad()
def told(model: Any, ids: torch.Tensor, calls: list[int], mask: torch.Tensor | None = None, crop: int = 0) -> Any:
    """Logits of a text that comes in calls of so many tokens; after each call of several, some may be taken back."""
    out, cache, start = [], None, 0
    for tokens in calls:
        stop = start + tokens
        seen = None if mask is None else mask[:, :stop]
        result = model(ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True)
        out.append(result.logits)
        cache, start = result.past_key_values, stop
        if crop and 1 < tokens < 9:
            cache.crop(-crop)
            start -= crop
    return torch.cat(out, 1)


@pytest.mark.parametrize("row", [LIMITS[0], *LOSSY, QUEST, LSERVE, *PLACED], ids=named)
@pytest.mark.parametrize("masked", [False, True])
def test_calls_of_one_token_between_others(row: Row, masked: bool) -> None:
    """Prompts in between, padding in the middle of a row, and single tokens that are padding."""
    ids, mask = LLAMA.prompt(60, rows=3), torch.ones(3, 60, dtype=torch.int64)
    mask[0, :5] = mask[1, 20:33] = mask[2, 39] = mask[2, 44] = 0
    calls = [17, 1, 1, 1, 9, 1, 1, 1, 1, 1, 3, *[1] * 23]
    recorded, plain = (lc.patch(LLAMA.make(), row.method(LLAMA), cuda_graph=on) for on in (True, False))
    with recorders() as again:
        a, b = (told(model, ids, calls, mask if masked else None) for model in (recorded, plain))
    assert again.replayed > 15
    real = mask.bool() if masked else torch.ones(3, 60, dtype=torch.bool)
    torch.testing.assert_close(a[real], b[real], rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("row", [LIMITS[0], QUEST, LSERVE, *PLACED[-2:]], ids=named)
def test_tokens_taken_back(row: Row) -> None:
    ids, calls = LLAMA.prompt(60), [17, *[1] * 7, 5, *[1] * 6, 4, *[1] * 9]
    models = (lc.patch(LLAMA.make(), row.method(LLAMA), cuda_graph=on) for on in (True, False))
    with recorders() as again:
        a, b = (told(model, ids, calls, crop=3) if row is not LSERVE else told(model, ids, calls) for model in models)
    assert again.replayed > 8
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


def test_rows_stay_alike() -> None:
    """Nobody looks at the mask while steps are recorded; the next call of several tokens does."""
    model, ids = lc.patch(LLAMA.make(), "dense"), LLAMA.prompt(60, rows=2)
    mask = torch.ones_like(ids)
    with recorders(), torch.no_grad():
        cache = model(ids[:, :20], attention_mask=mask[:, :20], use_cache=True).past_key_values
        for i in range(20, 30):
            model(ids[:, i : i + 1], attention_mask=mask[:, : i + 1], past_key_values=cache)
        assert cache.ledger.loose
        model(ids[:, 30:40], attention_mask=mask[:, :40], past_key_values=cache)
    assert cache.ledger.lengths is None
    assert cache.ledger.tail is None


def test_assisted_decoding() -> None:
    model, helper, inputs = LLAMA.make(), LLAMA.make(1), single(LLAMA)
    expected = generate(model, inputs).sequences
    lc.patch(model, "dense")
    lc.patch(helper, "dense")
    helper.generation_config.assistant_confidence_threshold = (
        0.0  # it drafts several tokens, and takes most of them back
    )
    helper.generation_config.num_assistant_tokens = 6
    with recorders() as again:
        assert torch.equal(generate(model, inputs, assistant_model=helper).sequences, expected)
    assert again.replayed > 0


def test_evicting_by_hand() -> None:
    ids, out = LLAMA.prompt(60), []
    for on in (True, False):
        model = lc.patch(LLAMA.make(), "streaming_llm", sinks=2, window=9, cuda_graph=on)
        with recorders(), torch.no_grad():
            cache = model(ids[:, :20], use_cache=True).past_key_values
            for i in range(20, 40):
                if i in (25, 31):
                    lc.evict(model, 4)
                out.append(model(ids[:, i : i + 1], past_key_values=cache).logits)
    recorded, plain = torch.cat(out[:20]), torch.cat(out[20:])
    torch.testing.assert_close(recorded, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "ROOM", 64)
    model = lc.patch(LLAMA.make(), LSERVE.method(LLAMA))
    with recorders():
        out = generate(model, single(LLAMA), max_new_tokens=20)
        report = lc.report(model)
        assert (report.graphs, report.graph_bytes, report.eager) == (2, 2, None)  # with a new choice and without
        assert "CUDA graphs: 2" in str(report)
        assert report.kv_bytes == out.past_key_values.kv_bytes
        assert report.tokens_seen == 59


def _hooked(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *args: None)


REASONS: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "files": ("llama", FILES, {}, "blocks lie in files"),
    "hook": ("llama", LIMITS[0], {"prepare": _hooked}, "has a hook"),
    "hidden states": ("llama", LIMITS[0], {"output_hidden_states": True}, "hidden states"),
    "gradients": ("llama", LIMITS[0], {"grad": True}, "gradients"),
    "frequencies": ("llama_dynamic", LIMITS[0], {}, "dynamic"),
    "positions": ("opt", LIMITS[0], {}, "position_ids"),
}


@torch.no_grad()
def test_entries_of_a_longer_call_are_made_first() -> None:
    model, ids = lc.patch(LLAMA.make(), INF_LLM.method(LLAMA)), LLAMA.prompt(40)
    with recorders() as again:
        cache, said = model(ids[:, :24]).past_key_values, []  # the last 8 tokens at once, two blocks
        for i in range(24, 40):
            model(ids[:, i : i + 1], past_key_values=cache)
            said.append(lc.report(model).eager)
    assert "made first" in (said[0] or "")
    assert said[1:] == [None] * 15
    assert again.replayed > 5


@pytest.mark.parametrize("why", REASONS)
def test_one_reason_why_not(why: str) -> None:
    name, row, options, expected = REASONS[why]
    case, options = BY_NAME[name], dict(options)
    model, ids = lc.patch(case.make(), row.method(case)), case.prompt(30)
    options.pop("prepare", lambda model: None)(model)
    with recorders() as again, torch.set_grad_enabled(options.pop("grad", False)):
        cache = model(ids[:, :28], use_cache=True).past_key_values
        assert lc.report(model).eager is None
        for i in (28, 29):
            model(ids[:, i : i + 1], past_key_values=cache, **options)
    assert again.recorded == 0
    assert expected in (lc.report(model).eager or "")
    assert "no CUDA graph: " in str(lc.report(model))


def test_a_trace_sees_every_choice() -> None:
    model = lc.patch(LLAMA.make(), QUEST.method(LLAMA))
    with recorders() as again, lc.trace(model) as seen:
        generate(model, single(LLAMA))
    assert again.recorded == 0
    assert seen.spans(40)


def test_turned_off() -> None:
    model = lc.patch(LLAMA.make(), "dense", cuda_graph=False)
    with recorders() as again:
        generate(model, single(LLAMA))
        assert again.recorded == 0
        lc.patch(model, "dense")
        generate(model, single(LLAMA))
        assert again.recorded > 0


def test_a_block_puts_the_choice_back() -> None:
    model = lc.patch(LLAMA.make(), "dense", cuda_graph=False)
    with recorders() as again:
        with lc.patched(model, "streaming_llm", window=20):
            generate(model, single(LLAMA))
            recorded = again.recorded
        generate(model, single(LLAMA))
        assert again.recorded == recorded > 0


class Broken(Again):
    """Cannot be recorded."""

    def __init__(self, run: Any, device: torch.device, pool: list[Any]) -> None:
        raise torch.OutOfMemoryError("no room for a graph")


def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    expected = generate(lc.patch(LLAMA.make(), "dense", cuda_graph=False), batch(LLAMA)).sequences
    model = lc.patch(LLAMA.make(), "dense")
    with recorders(Broken):
        assert torch.equal(generate(model, batch(LLAMA)).sequences, expected)
    assert "could not be recorded (OutOfMemoryError: no room for a graph)" in (lc.report(model).eager or "")
    assert lc.report(model).graphs == 0


def test_no_memory_to_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, step: Any) -> None:
        raise torch.OutOfMemoryError("full")

    expected = generate(lc.patch(LLAMA.make(), "dense", cuda_graph=False), batch(LLAMA)).sequences
    model = lc.patch(LLAMA.make(), "dense")
    monkeypatch.setattr(LongContextCache, "prepare", refuse)
    with recorders() as again:
        assert torch.equal(generate(model, batch(LLAMA)).sequences, expected)
    assert again.recorded == 0
    assert "no memory" in (lc.report(model).eager or "")


def test_a_copy_records_for_itself() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    with recorders() as again:
        expected = generate(model, single(LLAMA)).sequences
        other = copy.deepcopy(model)
        before = again.recorded
        assert torch.equal(generate(other, single(LLAMA)).sequences, expected)
        assert again.recorded > before
        assert torch.equal(generate(pickle.loads(pickle.dumps(model)), single(LLAMA)).sequences, expected)
    assert "forward" not in vars(lc.unpatch(other).get_decoder())


def test_beams_do_not_record_again() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    with recorders() as again:
        generate(model, single(LLAMA), num_beams=3, max_new_tokens=30)
    assert again.recorded <= 5  # 30 tokens, 8 at a time


class Late(Again):
    """Fails at the end of recording a new choice of blocks: the host has run the call, the device has not."""

    failed = 0

    def __init__(self, run: Any, device: torch.device, pool: list[Any]) -> None:
        super().__init__(run, device, pool)
        kept = [kept for kept in self._kept() if kept.since is not None]
        if all(columns == self._known[0] for columns in [k.since for k in kept]) or not kept:
            return
        ids = [k.ids.clone() for k in kept]
        tally = {key: both.clone() for key, both in self._cache.ledger.tally.items()}
        run()
        for k, old in zip(kept, ids, strict=True):
            k.ids.copy_(old)
        for key, both in tally.items():
            self._cache.ledger.tally[key].copy_(both)
        if any(k.since == self._known[0] for k in kept):
            Late.failed += 1
            raise RuntimeError("failed late")


def test_a_choice_that_could_not_be_recorded_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "ROOM", 64)
    recorded, plain = (lc.patch(LLAMA.make(), LSERVE.method(LLAMA), cuda_graph=on) for on in (True, False))
    with recorders(Late):
        assert_same(*(generate(m, single(LLAMA), max_new_tokens=40, output_logits=True) for m in (recorded, plain)))
    assert Late.failed == 1
    assert "failed late" in (lc.report(recorded).eager or "")


class Shares(Again):
    """Notes how many graphs of the cache it shares memory with."""

    with_others: ClassVar[list[int]] = []

    def __init__(self, run: Any, device: torch.device, pool: list[Any]) -> None:
        super().__init__(run, device, pool)
        Shares.with_others.append(len(pool))
        pool.append(self)


@torch.no_grad()
def test_memory_of_graphs_that_are_all_gone_is_not_recorded_into() -> None:
    model, ids = lc.patch(LLAMA.make(), "dense"), LLAMA.prompt(40)
    with recorders(Shares):
        cache = model(ids[:, :30], use_cache=True).past_key_values
        for i in range(30, 36):
            if i == 34:
                cache.reorder_cache(torch.tensor([0]))  # to memory of its own
            model(ids[:, i : i + 1], past_key_values=cache)
    assert Shares.with_others == [0, 0]


def test_patched_gives_the_setting_back() -> None:
    model = lc.patch(LLAMA.make(), "dense", cuda_graph=False)
    with lc.patched(model, "quest", token_budget=48):
        pass
    with recorders() as again:
        generate(model, single(LLAMA))
    assert again.recorded == 0


def test_a_module_put_in_later_is_looked_at() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> Any:
            return self.inner(x)

    model, calls = lc.patch(LLAMA.make(), "dense"), []
    with recorders() as again:
        generate(model, single(LLAMA))
        model.model.layers[1].mlp = Wrapped(model.model.layers[1].mlp)
        model.model.layers[1].mlp.register_forward_hook(lambda *args: calls.append(1))
        before = again.recorded
        generate(model, single(LLAMA))
    assert again.recorded == before
    assert len(calls) == 12
    assert "has a hook" in (lc.report(model).eager or "")
