"""A step launched before it is known whether the one before was the last leaves nothing behind: on the CPU, no graph.

The same calls of `generate()` are made with a check after each step and with one that comes late.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.generation import LogitsProcessor, StoppingCriteria
from transformers.generation import utils as stock
from transformers.generation.streamers import BaseStreamer

import hf_longctx as lc
from hf_longctx import ahead
from hf_longctx.cache.cache import LongContextCache
from hf_longctx.cache.last import can_crop
from hf_longctx.models import CACHE
from hf_longctx.patch import state_of

from ..methods.cases import LIMITS, LOSSY, SELECTING, Row, gates, named
from .again import recorders
from .cases import BY_NAME
from .test_generate import batch, generate, single
from .test_graph import LSERVE, PLACED, QUEST

LLAMA = BY_NAME["llama"]
DENSE = LIMITS[0]
RECENT = Row("recent", lambda case: lc.Dense(kv="int4"))
AGAIN = lc.LServe(pattern=gates(LLAMA), sparsity=0.0, token_budget=24, page=8, logical=4, refresh_every=3, kv="native")
ROWS = (DENSE, *LOSSY, *SELECTING, *PLACED[2:], RECENT)
VOCABULARY = LLAMA.build().config.vocab_size
EARLY: dict[str, Any] = {"max_new_tokens": 40, "eos_token_id": list(range(VOCABULARY // 16)), "pad_token_id": 0}
"""Some of the tokens end a row, so that rows end at different steps."""


@dataclass
class Seen:
    """What the checks of some calls did."""

    late: int = 0
    back: int = 0


@contextmanager
def counted(patch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """Count answers that were left for later, and steps that were taken back."""
    seen, check, back = Seen(), ahead.LateCheck.__call__, ahead.take_back

    def checked(self: Any, *args: Any) -> bool:
        done = check(self, *args)
        seen.late += self._open is not None
        return done

    def taken(cache: Any) -> None:
        seen.back += 1
        back(cache)

    patch.setattr(ahead.LateCheck, "__call__", checked)
    patch.setattr(ahead, "take_back", taken)
    yield seen


def at_once(patch: pytest.MonkeyPatch) -> None:
    """Let no criterion be known, so that each step is waited for."""
    patch.setattr(ahead, "CRITERIA", set())


def run(model: Any, inputs: dict[str, Tensor], late: bool, **options: Any) -> tuple[Any, Seen, Tensor]:
    """What `generate` gives on a model whose steps are recorded, what its checks did, and the generator afterwards."""
    with pytest.MonkeyPatch.context() as patch, recorders(), counted(patch) as seen:
        if not late:
            at_once(patch)
        out = generate(model, inputs, **options)
    return out, seen, torch.get_rng_state()


def both(row: Row, inputs: dict[str, Tensor], **options: Any) -> list[tuple[Any, Seen, Tensor]]:
    """`run` on two models, late and at once."""
    return [run(lc.patch(LLAMA.make(), row.method(LLAMA)), inputs, late, **options) for late in (True, False)]


def assert_same_state(a: LongContextCache, b: LongContextCache) -> None:
    """Two caches have seen the same text, and will choose blocks anew at the same steps."""
    assert a.ledger.columns == b.ledger.columns
    assert torch.equal(a.ledger.row_lengths, b.ledger.row_lengths)
    assert not a.ledger.begun
    due = [
        [store.kept.is_due(3, columns) for stack in x.stacks for _, store in stack.stores]
        for columns in range(a.ledger.columns, a.ledger.columns + 4)
        for x in (a, b)
    ]
    assert due[::2] == due[1::2]


WAYS = {
    "greedy": {},
    "drawn": {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
}


@pytest.mark.parametrize(
    ("row", "way"), [*product(ROWS, ["drawn"]), (DENSE, "greedy"), (LSERVE, "penalties")], ids=named
)
def test_rows_that_end_at_different_steps(row: Row, way: str) -> None:
    options = {**EARLY, **WAYS[way], "return_dict_in_generate": False}
    (late, seen, draws), (plain, none, same) = both(row, batch(LLAMA), **options)
    assert torch.equal(late, plain)
    assert torch.equal(draws, same)
    assert seen.late > 0
    assert none.late == none.back == 0
    assert seen.back == (late.shape[1] < batch(LLAMA)["input_ids"].shape[1] + 40)


def test_some_text_ends_before_its_length() -> None:
    """Or nothing of what these tests say was seen."""
    late, seen, _ = both(DENSE, batch(LLAMA), **EARLY)[0]
    assert seen.back == 1
    assert 0 < late.sequences.shape[1] - 40 < 40


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_the_last_step_before_the_length_is_known(row: Row) -> None:
    (late, seen, _), (plain, _, _) = both(row, single(LLAMA), max_new_tokens=12, output_logits=True)
    assert (seen.late > 0) == can_crop(late[CACHE])
    assert seen.back == 0
    assert torch.equal(late.sequences, plain.sequences)
    assert len(late.logits) == len(plain.logits) == 12
    assert_same_state(late[CACHE], plain[CACHE])


@pytest.mark.parametrize("row", [DENSE, QUEST, LSERVE], ids=named)
def test_a_cache_that_is_returned_forgets_the_step(row: Row) -> None:
    wanted = {"output_logits": True, "output_scores": True, "do_sample": True}
    (late, seen, _), (plain, _, _) = both(row, batch(LLAMA), **EARLY, **wanted)
    assert seen.back == (row.name != "lserve")  # whose windows have lost a token: each step is waited for
    assert (seen.late > 0) == (row.name != "lserve")
    for name in ("logits", "scores"):
        assert len(late[name]) == len(plain[name]) == late.sequences.shape[1] - 40
        assert all(torch.equal(a, b) for a, b in zip(late[name], plain[name], strict=True))
    assert_same_state(late[CACHE], plain[CACHE])


def chat(method: Any, late: bool) -> tuple[list[Any], Tensor, int]:
    """Logits of four turns of a chat on one cache, its text, and how many steps were taken back."""
    model, answers, backs = lc.patch(LLAMA.make(), method), [], 0
    state = state_of(model)
    assert state is not None
    text, cache = LLAMA.prompt(40), LongContextCache(state.plan)
    for turn in range(4):
        asked = {"input_ids": text, "attention_mask": torch.ones_like(text)}
        options = {**EARLY, "max_new_tokens": 60, CACHE: cache, "output_logits": True}
        out, seen, _ = run(model, asked, late, **options)
        text = torch.cat([out.sequences, LLAMA.prompt(turn)], 1)  # the second turn goes on where the first one ended
        answers += out.logits
        backs += seen.back
    return answers, text, backs


@pytest.mark.parametrize("method", [QUEST.method(LLAMA), AGAIN], ids=["each_step", "some_steps"])
def test_a_chat_goes_on_as_if_no_step_had_been_too_many(method: Any) -> None:
    (answers, text, backs), (expected, same, none) = chat(method, True), chat(method, False)
    assert none == 0 < backs
    assert torch.equal(text, same)
    assert len(answers) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(answers, expected, strict=True))


# what is left as it is --------------------------------------------------------------------------------------------


class Criterion(StoppingCriteria):
    """Somebody's own code, which may count."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Processor(LogitsProcessor):
    """Likewise."""

    def __call__(self, input_ids: Tensor, scores: Any) -> Any:
        return scores


def _hook(*_: Any) -> None:
    """Somebody looks at every call of the model."""


OWN: dict[str, dict[str, Any]] = {
    "criterion": {"stopping_criteria": [Criterion()]},
    "processor": {"logits_processor": [Processor()]},
    "prefix": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(VOCABULARY))},
    "beams": {"num_beams": 2},
    "no_cache": {"use_cache": False},
    "hidden_states": {"output_hidden_states": True},
}


@pytest.mark.parametrize("why", [*OWN, "hook", "head_hook", "no_graph", "a cap"])
def test_each_step_is_waited_for_where_one_more_could_be_noticed(why: str) -> None:
    model = lc.patch(LLAMA.make(), "dense", cuda_graph=why != "no_graph")
    if why == "hook":
        model.register_forward_hook(_hook)
    if why == "head_hook":
        model.lm_head.register_forward_pre_hook(_hook)
    if why == "a cap":
        lc.patch(model, QUEST.method(LLAMA), placement=lc.HostLRU(3, ram="1GiB"))
    out, seen, _ = run(model, single(LLAMA), True, **{**EARLY, **OWN.get(why, {})})
    assert out.sequences.shape[1] > 40
    assert seen.late == seen.back == 0


def test_steps_that_are_not_recorded_are_waited_for() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    model.model.layers[0].register_forward_hook(_hook)
    _, seen, _ = run(model, single(LLAMA), True, **EARLY)
    assert "hook" in str(lc.report(model).eager)
    assert seen.late == 0


def test_assisted_decoding() -> None:
    model, assistant = (lc.patch(LLAMA.make(), "dense") for _ in range(2))
    out, seen, _ = run(model, single(LLAMA), True, assistant_model=assistant, **EARLY)
    plain, _, _ = run(lc.patch(LLAMA.make(), "dense"), single(LLAMA), False, **EARLY)
    assert seen.late == 0
    assert torch.equal(out.sequences, plain.sequences)


def test_time_is_up() -> None:
    """After the first token, which no step follows, whoever asks."""
    out, _, _ = both(DENSE, single(LLAMA), max_new_tokens=30, max_time=0.0)[0]
    assert out.sequences.shape[1] == 41


class Told(BaseStreamer):
    """Notes what it gets; fails at one of the tokens."""

    def __init__(self, fails: int | None = None) -> None:
        self.tokens: list[Tensor] = []
        self.fails, self.ended = fails, 0

    def put(self, value: Tensor) -> None:
        self.tokens.append(value)
        if len(self.tokens) == self.fails:
            raise InterruptedError

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("options", [EARLY, {"max_new_tokens": 9}], ids=["ends", "length"])
def test_a_streamer_is_told_each_token_once(options: dict[str, Any]) -> None:
    told = Told(), Told()
    for streamer, late in zip(told, (True, False), strict=True):
        model = lc.patch(LLAMA.make(), "dense")
        out, seen, _ = run(model, single(LLAMA), late, streamer=streamer, **options)
        assert (seen.late > 0) == late
        assert torch.equal(torch.cat([x.flatten() for x in streamer.tokens]), out.sequences[0])
        assert streamer.ended == 1
    assert len(told[0].tokens) == len(told[1].tokens)


@pytest.mark.parametrize("row", [DENSE, LSERVE, PLACED[0]], ids=named)
def test_a_streamer_that_fails_leaves_the_cache_as_it_would(row: Row) -> None:
    held = []
    for late in (True, False):
        model = lc.patch(LLAMA.make(), row.method(LLAMA))
        state = state_of(model)
        assert state is not None
        cache = LongContextCache(state.plan)
        options = {"max_new_tokens": 30, "do_sample": True, CACHE: cache}
        with pytest.raises(InterruptedError):
            run(model, single(LLAMA), late, streamer=Told(fails=8), **options)
        held.append((cache, torch.get_rng_state()))
    (cache, draws), (same, expected) = held
    assert cache.ledger.columns == 40 + 6
    assert_same_state(cache, same)
    assert torch.equal(draws, expected)


# in place of transformers' own -------------------------------------------------------------------------------------


def test_models_that_are_not_patched_get_the_answer_of_transformers() -> None:
    run(lc.patch(LLAMA.make(), "dense"), single(LLAMA), True, max_new_tokens=3)
    check: Any = stock.DeferredStopCheck
    assert isinstance(check, ahead.Checks)
    for device in ("cpu", "mps"):
        asked = torch.device(device), DynamicCache(), False
        assert check.is_supported(*asked, is_assistant=False) == (device == "mps")
    made = check(torch.zeros(1, 1, dtype=torch.int64), 3, DynamicCache(), False, None)
    assert type(made) is check.stock


def test_a_class_of_another_form_is_let_be(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        @staticmethod
        def is_supported(device: Any) -> bool:
            return False

    monkeypatch.setattr(stock, "DeferredStopCheck", Other)
    assert not ahead._installed()
    assert stock.DeferredStopCheck is Other
    monkeypatch.delattr(stock, "DeferredStopCheck")
    assert not ahead._installed()


def test_unpatching_leaves_the_model_as_it_was() -> None:
    model = LLAMA.make()
    before, settings = dict(vars(model)), GenerationConfig(do_sample=False)
    run(lc.patch(model, "dense"), single(LLAMA), True, generation_config=settings, max_new_tokens=3)
    assert not any(ahead._NOTED in vars(x) for x in (settings, model.generation_config))
    assert vars(lc.unpatch(model)) == before
    assert generate(model, single(LLAMA)).sequences.shape[1] == 52


def test_a_copy_of_a_patched_model_notes_for_itself() -> None:
    model = copy.deepcopy(lc.patch(LLAMA.make(), "dense"))
    assert vars(model)[ahead.METHODS[0]].model is model
    assert run(model, batch(LLAMA), True, **EARLY)[1].late > 0
