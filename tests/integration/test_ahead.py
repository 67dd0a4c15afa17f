"""A step launched before it is known whether the one before was the last leaves nothing behind: on the CPU, no graph.

The same calls of `generate()` are made with a check after each step and with one that comes late.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation import LogitsProcessor, StoppingCriteria
from transformers.generation import utils as stock
from transformers.generation.streamers import BaseStreamer

import hf_longctx as lc
from hf_longctx import ahead
from hf_longctx.cache.cache import LongContextCache

from ..methods.cases import LIMITS, LOSSY, SELECTING, Row, named
from .again import recorders
from .cases import BY_NAME
from .test_generate import batch, generate, single
from .test_graph import FILES, LSERVE, PLACED, QUEST

LLAMA = BY_NAME["llama"]
DENSE = LIMITS[0]
RECENT = Row("recent", lambda case: lc.Dense(kv="int4"))
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
    """Two caches hold the same text: the same lengths, and the same answers to what comes next, however it comes."""
    assert a.ledger.columns == b.ledger.columns
    assert torch.equal(a.ledger.row_lengths, b.ledger.row_lengths)
    assert a.pending is None
    for one, other in zip(a.stacks, b.stacks, strict=True):
        kept = [[store.kept.since for _, store in stack.stores] for stack in (one, other)]
        assert kept[0] == kept[1]


WAYS = {
    "greedy": {},
    "drawn": {"do_sample": True, "num_return_sequences": 3, "temperature": 1.5},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", ROWS, ids=named)
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
    assert seen.late > 0
    assert seen.back == 0
    assert torch.equal(late.sequences, plain.sequences)
    assert len(late.logits) == len(plain.logits) == 12
    assert_same_state(late.past_key_values, plain.past_key_values)


@pytest.mark.parametrize("row", [DENSE, QUEST, LSERVE], ids=named)
def test_a_cache_that_is_returned_forgets_the_step(row: Row) -> None:
    wanted = {"output_logits": True, "output_scores": True, "do_sample": True}
    (late, seen, _), (plain, _, _) = both(row, batch(LLAMA), **EARLY, **wanted)
    assert seen.back == (row.name != "lserve")  # whose windows have lost a token: each step is waited for
    assert (seen.late > 0) == (row.name != "lserve")
    for name in ("logits", "scores"):
        assert len(late[name]) == len(plain[name]) == late.sequences.shape[1] - 40
        assert all(torch.equal(a, b) for a, b in zip(late[name], plain[name], strict=True))
    assert_same_state(late.past_key_values, plain.past_key_values)


@pytest.mark.parametrize("every", [1, 4])
def test_a_chat_goes_on_as_if_no_step_had_been_too_many(every: int) -> None:
    method = lc.Quest(8, page=4, sink=0, dense_layers=0, refresh_every=every)
    answers, texts = [], []
    for late in (True, False):
        model = lc.patch(LLAMA.make(), method)
        text, cache, backs = LLAMA.prompt(40), LongContextCache(model_plan(model)), 0
        for turn in range(4):
            out, seen, _ = run(model, {"input_ids": text}, late, past_key_values=cache, output_logits=True, **EARLY)
            text = torch.cat([out.sequences, LLAMA.prompt(5 + turn)], 1) if turn < 2 else out.sequences
            backs += seen.back
            answers.append(out.logits)
        texts.append(text)
        assert (backs > 1) == late
    assert torch.equal(*texts)
    for a, b in zip(answers[:4], answers[4:], strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def model_plan(model: Any) -> lc.Plan:
    """The plan in force on a model."""
    from hf_longctx.patch import state_of

    state = state_of(model)
    assert state is not None
    return state.plan
