"""MPT, whose positions are linear biases: against a loop over queries and keys, with its own forward in float64."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

import hf_longctx as lc
from hf_longctx.models import inspect_model
from hf_longctx.testing import feed, key_positions

from ..integration.cases import BY_NAME
from . import draws

MODEL: Any = BY_NAME["mpt"].make()


def attend(q: Tensor, k: Tensor, v: Tensor, at: Tensor, slope: float, scale: float) -> Tensor:
    """One head, q, k, v `[C, D]`, at `[C, C]` the position at which each query reads each key."""
    out = torch.zeros_like(v)
    for i in range(len(q)):
        seen = [j for j in range(len(k)) if at[i, j] >= 0]
        if seen:
            logits = [scale * (q[i] @ k[j]) + slope * (at[i, j] - at[i, i]) for j in seen]
            out[i] = torch.stack(logits).softmax(0) @ v[seen]
    return out


@torch.no_grad()
def mpt_logits(ids: Tensor, at: list[Tensor]) -> Tensor:
    heads = MODEL.config.n_heads
    slopes = [2 ** (-8 * (h + 1) / heads) for h in range(heads)]  # of the paper, for a power of two
    x = MODEL.transformer.wte.weight.double()[ids]

    def norm(x: Tensor, module: Any) -> Tensor:
        return layer_norm(x, x.shape[-1:], module.weight.double(), None, module.eps)

    for block in MODEL.transformer.blocks:
        q, k, v = (norm(x, block.norm_1) @ block.attn.Wqkv.weight.double().T).chunk(3, -1)
        mixed = torch.empty_like(x)
        for row in range(len(ids)):
            for h in range(heads):
                mine = slice(h * q.shape[-1] // heads, (h + 1) * q.shape[-1] // heads)
                scale = (q.shape[-1] // heads) ** -0.5
                mixed[row, :, mine] = attend(
                    q[row, :, mine], k[row, :, mine], v[row, :, mine], at[row], slopes[h], scale
                )
        x = x + mixed @ block.attn.out_proj.weight.double().T
        up = gelu(norm(x, block.norm_2) @ block.ffn.up_proj.weight.double().T)
        x = x + up @ block.ffn.down_proj.weight.double().T
    return norm(x, MODEL.transformer.norm_f) @ MODEL.lm_head.weight.double().T


@settings(max_examples=10)
@given(st.data(), st.integers(0, 4), st.integers(1, 12))
def test_distances_are_counted_in_the_cache(data: st.DataObject, sinks: int, window: int) -> None:
    total = data.draw(st.integers(1, 40))
    mask = data.draw(draws.padding(total))
    ids = draws.tokens(1 if mask is None else len(mask), total, seed=0, vocabulary=128)
    plan = lc.StreamingLLM(sinks, window).plan(inspect_model(MODEL))
    policy = plan.layers[0].groups[0].policy
    oracle = mpt_logits(ids, [key_positions(policy, [total], m) for m in ([None] if mask is None else mask)])
    with lc.patched(MODEL, plan):
        got, _ = feed(MODEL, ids, data.draw(draws.calls(total)), mask)
    draws.assert_equal(MODEL, got, oracle, sinks + window, mask)
