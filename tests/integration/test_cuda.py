"""The same code on a GPU: dense limits, chunking and padding on every family, in the dtypes that are used there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_longctx as lc
from hf_longctx.testing import Widened, oracle_gradients

from ..methods.cases import LIMITS, LOSSY, SELECTING, TOKENS, Row, changes_with_length, named, pairs
from .tiny import Case

pytestmark = [pytest.mark.cuda]

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

RANDOM = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def logits(model: Any, ids: torch.Tensor, calls: list[int], mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a text that comes in calls of so many tokens, `[B, T, V]`."""
    out, cache, start = [], None, 0
    for tokens in calls:
        stop = start + tokens
        seen = None if mask is None else mask[:, :stop]
        result = model(ids[:, start:stop], attention_mask=seen, past_key_values=cache, use_cache=True)
        out.append(result.logits)
        cache, start = result.past_key_values, stop
    return torch.cat(out, 1)


@pytest.mark.parametrize("pair", pairs(LIMITS), ids=lambda pair: f"{named(pair[0])}-{named(pair[1])}")
@torch.no_grad()
def test_dense_limit(pair: tuple[Row, Case]) -> None:
    row, case = pair
    model = case.make(0).cuda()
    tokens = row.tokens(case)
    ids = case.prompt(tokens, 2).cuda()
    stock = model(ids).logits
    lc.patch(model, row.method(case))
    torch.testing.assert_close(model(ids).logits, stock, rtol=1e-4, atol=1e-5 * float(stock.abs().max()) + 1e-5)


@pytest.mark.parametrize("pair", pairs(LOSSY), ids=lambda pair: f"{named(pair[0])}-{named(pair[1])}")
@torch.no_grad()
def test_chunks_and_padding(pair: tuple[Row, Case]) -> None:
    row, case = pair
    if changes_with_length(case) and not row.in_cache:
        pytest.skip("the model's own frequencies change with the length of a call")
    model = case.make(0).cuda()
    ids = case.prompt(TOKENS, 2).cuda()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    lc.patch(model, row.method(case))
    whole = logits(model, ids, [TOKENS], mask)
    scale = float(whole.abs().max())
    for calls in ([1] * TOKENS, [7] * 8 + [4], [31, 1, 28]):
        parts = logits(model, ids, calls, mask)
        torch.testing.assert_close(parts[1], whole[1], rtol=1e-4, atol=1e-5 * scale)
        torch.testing.assert_close(parts[0, 9:], whole[0, 9:], rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("pair", pairs(SELECTING), ids=lambda pair: f"{named(pair[0])}-{named(pair[1])}")
@torch.no_grad()
def test_the_same_blocks_as_on_the_cpu(pair: tuple[Row, Case]) -> None:
    """In float64, where no rounding turns a choice: prompts, decode steps of one and of several tokens, padding."""
    row, case = pair
    ids, calls = case.prompt(TOKENS, 2), [33, *[1] * 9, 3, 15]
    mask = torch.ones_like(ids)
    mask[0, :9] = 0

    def run(device: str) -> torch.Tensor:
        model = case.make(0).double().to(device)
        model.get_decoder().config._experts_implementation_internal = "eager"  # others do not take float64
        lc.patch(model, row.method(case))
        with Widened(torch.float64):
            return logits(model, ids.to(device), calls, mask.to(device)).cpu()

    here, there = run("cpu"), run("cuda")
    real = mask.bool()
    torch.testing.assert_close(there[real], here[real], rtol=1e-5, atol=1e-6 * float(here[real].abs().max()))


@pytest.mark.parametrize("zero_sink", [False, True])
@pytest.mark.parametrize("row", [LIMITS[0], *LOSSY, SELECTING[1]], ids=named)
def test_gradients_are_those_of_the_oracle(row: Row, zero_sink: bool) -> None:
    case = next(case for _, case in pairs(LIMITS) if case.name == "llama")
    model, ids = case.make(0), case.prompt(TOKENS, 2)
    plan = lc.report(lc.patch(model, row.method(case), zero_sink=zero_sink)).plan
    expected = oracle_gradients(lc.unpatch(model), plan, ids, ids)
    lc.patch(model.cuda().train(), plan, train=True)
    model(ids.cuda(), labels=ids.cuda()).loss.backward()
    for name, weight in model.named_parameters():
        got = weight.grad.double().cpu()
        torch.testing.assert_close(got, expected[name], rtol=0, atol=1e-3 * float(expected[name].abs().max()), msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_generate_in_half_precision(dtype: torch.dtype) -> None:
    case = next(case for _, case in pairs(LIMITS) if case.name == "llama")
    model = case.make(0).cuda().to(dtype)
    ids = case.prompt(40, 2).cuda()
    stock = model.generate(ids, **RANDOM)
    lc.patch(model, "dense")
    assert torch.equal(model.generate(ids, **RANDOM), stock)
    lc.patch(model, "streaming_llm", sinks=2, window=9)
    assert model.generate(ids, **RANDOM).shape == stock.shape
    assert lc.report(model).tokens_stored == 11
