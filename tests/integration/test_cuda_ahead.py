"""On a GPU `generate()` launches a step before it knows whether the one before was the last; tokens stay the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import hf_longctx as lc

from ..methods.cases import Row, named
from .cases import BY_NAME
from .test_ahead import EARLY, VOCABULARY, at_once, counted
from .test_cuda_graph import ROWS, moved
from .test_generate import PROMPT, batch, generate, single

pytestmark = [pytest.mark.cuda]

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

LLAMA = BY_NAME["llama_wide_heads"]


def on_gpu() -> Any:
    """Heads of 64 channels in 16 bits, which the compiled kernels take."""
    config = LLAMA.build().config
    config.head_dim = 64
    torch.manual_seed(0)
    return type(LLAMA.build())(config).eval().cuda().to(torch.bfloat16)


@pytest.fixture(scope="module")
def model() -> Any:
    """One for all: each test patches it."""
    return on_gpu()


@pytest.mark.parametrize("options", [{**EARLY, "do_sample": True}, {"max_new_tokens": 30}], ids=["ends", "length"])
@pytest.mark.parametrize("row", ROWS, ids=named)
def test_the_same_tokens(row: Row, options: dict[str, Any], model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lc.patch(model, row.method(LLAMA))
    both = []
    for late in (True, False):
        with monkeypatch.context() as patch, counted(patch) as seen:
            if not late:
                at_once(patch)
            out = generate(model, moved(batch(LLAMA)), **{"return_dict_in_generate": False, **options})
        assert (seen.late > 0) == late
        both.append((out, torch.cuda.get_rng_state(), lc.report(model).tokens_seen))
    assert torch.equal(both[0][0], both[1][0])
    assert torch.equal(both[0][1], both[1][1])
    assert both[0][2] == both[1][2]


class Quiet(BaseStreamer):
    """From the sixth token on, whatever waits for the device is an error."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.tolist() if value.ndim == 1 else []
        if len(self.tokens) == 6:
            torch.cuda.set_sync_debug_mode("error")

    def end(self) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_no_step_waits_for_the_device(row: Row, model: Any) -> None:
    lc.patch(model, row.method(LLAMA))
    quiet = Quiet()
    settings = {"max_new_tokens": 30, "eos_token_id": VOCABULARY, "pad_token_id": 0}
    try:
        out = generate(model, moved(single(LLAMA)), streamer=quiet, return_dict_in_generate=False, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.shape[1] == PROMPT + 30
    assert out[0, PROMPT:].tolist() == quiet.tokens
