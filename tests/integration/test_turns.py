"""Several turns on one cache, and taking tokens back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_longctx as lc

from ..methods.cases import LIMITS, LOSSY, Row, named
from ..methods.test_limits import TOLERANCE, error
from .cases import BY_NAME
from .test_generate import REAL_TOKENS, SOME, generate
from .tiny import Case

some = pytest.mark.parametrize(("row", "case"), SOME, ids=named)
LLAMA = BY_NAME["llama"]
both = pytest.mark.parametrize("row", [*LIMITS, *LOSSY], ids=lambda row: f"{row.name}_{row.method(LLAMA)!r}"[:60])


def turn(ids: Tensor, mask: Tensor, more: Tensor, more_mask: Tensor) -> dict[str, Tensor]:
    """The text so far and the user's next words."""
    return {"input_ids": torch.cat((ids, more), 1), "attention_mask": torch.cat((mask, more_mask), 1)}


@some
def test_turns_on_one_cache_equal_one_long_text(row: Row, case: Case) -> None:
    """Rows are padded differently, the second turn between the words of the first and its own."""
    model = lc.patch(case.make(), row.method(case))
    mask = (torch.arange(20) >= torch.tensor([7, 0])[:, None]).long()
    inputs = {"input_ids": case.prompt(20, rows=2) * mask, "attention_mask": mask}
    cache = None
    for number, padding in enumerate([(0, 0), (3, 0), (0, 5)]):
        out = generate(model, inputs, past_key_values=cache, output_logits=True, max_new_tokens=6, **REAL_TOKENS)
        fresh = generate(model, inputs, output_logits=True, max_new_tokens=6, **REAL_TOKENS)
        assert torch.equal(out.sequences, fresh.sequences)
        assert error(torch.stack(out.logits), torch.stack(fresh.logits)) < TOLERANCE
        assert cache is None or out.past_key_values is cache
        cache = out.past_key_values
        assert cache.get_seq_length() == out.sequences.shape[1] - 1
        so_far = torch.cat((inputs["attention_mask"], torch.ones(2, 6, dtype=torch.long)), 1)
        more = (torch.arange(11) >= torch.tensor(padding)[:, None]).long()
        inputs = turn(out.sequences, so_far, case.prompt(11, rows=2, seed=5 + number) * more, more)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("row", [LIMITS[0], *LOSSY], ids=named)
def test_generated_pad_tokens_are_text_if_the_mask_says_so(row: Row, tokens: int) -> None:
    """Without a mask, `generate()` takes them for padding; but they are in the cache, and the answer stands on them."""
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    first = model.generate(
        LLAMA.prompt(20), max_new_tokens=6, do_sample=False, return_dict_in_generate=True, sequence_bias={(0,): 1e4}
    )
    assert bool((first.sequences[0, 20:] == model.generation_config.pad_token_id).all())
    more = LLAMA.prompt(tokens - 1, seed=2)  # the last generated token is not in the cache yet
    ids, cache = torch.cat((first.sequences, more), 1), first.past_key_values
    with pytest.raises(ValueError, match=r"pad tokens that the model generated.*torch.ones_like\(input_ids\)"):
        generate(model, {"input_ids": ids}, past_key_values=cache)
    assert cache.get_seq_length() == 25
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = generate(model, inputs).sequences
    assert torch.equal(generate(model, inputs, past_key_values=cache).sequences, expected)


def test_a_mask_of_the_new_tokens_alone_is_refused_for_its_width() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    cache, more = fill(model, LLAMA.prompt(20)), LLAMA.prompt(5)
    mask = torch.tensor([[0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match=r"got \[1, 5\]. Pass the mask of the whole text so far"):
        generate(model, {"input_ids": more, "attention_mask": mask}, past_key_values=cache)


# taking back ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(model: Any, ids: Tensor, record: bool = False, size: int | None = None) -> Any:
    """A cache that has seen the text in calls of `size` tokens."""
    cache = None
    for part in ids.split(size or ids.shape[1], 1):
        cache = model(part, past_key_values=cache, use_cache=True).past_key_values
        if record:
            cache.activate_past_recording()
    return cache


@torch.no_grad()
def next_logits(model: Any, cache: Any, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids, past_key_values=cache, use_cache=True).logits
    return logits


@pytest.mark.parametrize("removed", [1, 7, 29, 30])
@both
def test_crop_within_the_window_forgets(row: Row, removed: int) -> None:
    """Nothing has left any window that the shorter text would see again."""
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    ids, more = LLAMA.prompt(30), LLAMA.prompt(9, seed=2)
    cache = fill(model, ids, record=True, size=5)
    cache.crop(-removed)
    assert cache.get_seq_length() == 30 - removed
    expected = model(torch.cat((ids[:, : 30 - removed], more), 1)).logits[:, 30 - removed :]
    assert error(next_logits(model, cache, more), expected) < TOLERANCE


@pytest.mark.parametrize("size", [1, 3, 6])
@some
def test_a_full_ring_may_start_to_record(row: Row, case: Case, size: int) -> None:
    model = lc.patch(case.make(), row.method(case))
    ids, guess, more = case.prompt(40), case.prompt(6, seed=2), case.prompt(9, seed=3)
    cache = fill(model, ids)
    cache.activate_past_recording()
    for part in guess.split(size, 1):
        next_logits(model, cache, part)
    cache.crop(-6)
    expected = model(torch.cat((ids, more), 1)).logits[:, 40:]
    assert error(next_logits(model, cache, more), expected) < TOLERANCE


@pytest.mark.parametrize("row", LOSSY, ids=named)
def test_crop_beyond_what_the_ring_keeps_raises_and_changes_nothing(row: Row) -> None:
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    ids, more = LLAMA.prompt(40), LLAMA.prompt(9, seed=2)
    cache = fill(model, ids)
    with pytest.raises(ValueError, match=r"older ones have left the window of \d+ for good; got 3"):
        cache.crop(-3)
    assert cache.get_seq_length() == 40
    expected = model(torch.cat((ids, more), 1)).logits[:, 40:]
    assert error(next_logits(model, cache, more), expected) < TOLERANCE


@pytest.mark.parametrize("row", LOSSY, ids=named)
def test_crop_of_nothing_is_always_possible(row: Row) -> None:
    cache = fill(lc.patch(LLAMA.make(), row.method(LLAMA)), LLAMA.prompt(40))
    cache.crop(0)
    assert cache.get_seq_length() == 40


@pytest.mark.parametrize("number", [1, -41])
def test_crop_of_more_than_there_is_raises(number: int) -> None:
    cache = fill(lc.patch(LLAMA.make(), "dense"), LLAMA.prompt(40))
    with pytest.raises(ValueError, match="expected a number from -40 to 0"):
        cache.crop(number)
    assert cache.get_seq_length() == 40


@torch.no_grad()
def test_crop_stops_at_padding() -> None:
    """Of a column where a row has no token, no token of that row can be taken back."""
    model = lc.patch(LLAMA.make(), "dense")
    mask = (torch.arange(20) < torch.tensor([20, 17])[:, None]).long()
    ids, more = LLAMA.prompt(20, rows=2), LLAMA.prompt(5, rows=2, seed=2)
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    whole = turn(ids, mask, more, torch.ones_like(more))
    model(more, attention_mask=whole["attention_mask"], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="expected at most 5 tokens, as before these a row has padding; got 6"):
        cache.crop(-6)
    cache.crop(-4)
    swapped = {name: value.flip(0)[:, :-4] for name, value in whole.items()}
    more_mask = torch.ones(2, 3, dtype=torch.long)
    longer = turn(*swapped.values(), LLAMA.prompt(3, rows=2, seed=3), more_mask)
    got = model(longer["input_ids"][:, 21:], attention_mask=longer["attention_mask"], past_key_values=cache).logits
    assert error(got, model(**longer).logits[:, 21:]) < TOLERANCE
    with pytest.raises(ValueError, match="at most 4 tokens"):
        cache.crop(-5)


# rows ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", LOSSY, ids=named)
@torch.no_grad()
def test_one_prompt_many_answers(row: Row) -> None:
    """A prompt is encoded once, its rows are repeated, picked and continued differently."""
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    mask = (torch.arange(30) >= torch.tensor([9, 0])[:, None]).long()
    ids, more = LLAMA.prompt(30, rows=2) * mask, LLAMA.prompt(11, rows=4, seed=4)
    cache = model(ids, attention_mask=mask).past_key_values
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 2, 3, 5]))
    rows = torch.tensor([0, 0, 1, 1])
    whole = turn(ids[rows], mask[rows], more, torch.ones_like(more))
    got = model(more, attention_mask=whole["attention_mask"], past_key_values=cache).logits
    assert error(got, model(**whole).logits[:, 30:]) < TOLERANCE


@torch.no_grad()
def test_another_number_of_rows_is_refused() -> None:
    model = lc.patch(LLAMA.make(), "dense")
    cache = fill(model, LLAMA.prompt(10, rows=2))
    with pytest.raises(ValueError, match="expected a batch of 2 rows"):
        model(LLAMA.prompt(1, rows=3), past_key_values=cache)
    assert cache.get_seq_length() == 10


# making room --------------------------------------------------------------------------------------------------------


def test_evict_makes_room_in_the_cache_handed_out_last() -> None:
    model = lc.patch(LLAMA.make(), lc.StreamingLLM(sinks=2, window=9))
    with pytest.raises(ValueError, match="expected a patched model with a live cache; got none"):
        lc.evict(model, room=3)
    first, second = fill(model, LLAMA.prompt(40)), fill(model, LLAMA.prompt(40))
    lc.evict(model, room=6)
    step = LLAMA.prompt(1, seed=2)
    untouched, evicted = next_logits(model, first, step), next_logits(model, second, step)
    assert error(evicted, untouched) > 1e-2
    with lc.patched(model, lc.StreamingLLM(sinks=2, window=4)), torch.no_grad():  # 3 old tokens and the new one
        one_layer_deep = model(torch.cat((LLAMA.prompt(40), step), 1)).logits[:, -1:]
    assert error(evicted, one_layer_deep) > TOLERANCE  # deeper layers remember what the window showed them


@pytest.mark.parametrize("room", [-1, 10])
def test_evict_of_more_than_the_window_is_refused(room: int) -> None:
    model = lc.patch(LLAMA.make(), lc.StreamingLLM(sinks=2, window=9))
    cache = fill(model, LLAMA.prompt(40))
    with pytest.raises(ValueError, match="expected room between 0 and the window of 9"):
        lc.evict(cache, room)


@pytest.mark.parametrize("row", [LIMITS[0], LOSSY[1]], ids=named)
def test_evict_needs_positions_in_the_cache(row: Row) -> None:
    model = lc.patch(LLAMA.make(), row.method(LLAMA))
    cache = fill(model, LLAMA.prompt(40))
    with pytest.raises(ValueError, match="which has nothing to make room in"):
        lc.evict(model, room=1)
    assert cache.get_seq_length() == 40
