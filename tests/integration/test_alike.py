"""A prompt is stored for all groups of heads of a layer at once, also where some of them keep a window."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hf_longctx as lc
from hf_longctx import alike
from hf_longctx.kernels import ops

from .cases import BY_NAME

LLAMA = BY_NAME["llama_wide_heads"]
PATTERN = ((0.9, 0.1), (0.1, 0.9))
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@torch.no_grad()
def told(kv: str, device: str) -> torch.Tensor:
    """Logits of a prompt that is longer than the window, and of calls after it."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = LLAMA.make(0).to(device=device, dtype=dtype)
    lc.patch(model, lc.DuoAttention(pattern=PATTERN, sinks=4, window=20, kv=kv), cuda_graph=False)
    ids, cache, out = LLAMA.prompt(1110, rows=2).to(device), None, []
    for first, last in ((0, 1100), (1100, 1109), (1109, 1110)):
        result = model(ids[:, first:last], past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        out.append(result.logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kv", ["native", "int8", "int4"])
def test_all_groups_at_once_give_what_one_after_the_other_gives(
    kv: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fills: list[int] = []
    stock: Any = ops.fill_pages
    monkeypatch.setattr(
        ops, "fill_pages", lambda groups, *args, **kwargs: (fills.append(len(groups)), stock(groups, *args, **kwargs))
    )
    at_once = told(kv, device)
    assert fills[:2] == [2, 2]  # a layer each
    fills.clear()
    monkeypatch.setattr(alike, "_reads_near", lambda *args: False)
    assert torch.equal(at_once, told(kv, device))
    assert set(fills) == {1}
