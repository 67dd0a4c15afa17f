"""Antidiagonal scores by their literal definition, for the tests of what is made of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import ops


def literal_scores(q: Tensor, k: Tensor, q_pos: Tensor, block: int, stride: int, scale: float, causal: bool) -> Tensor:
    """`ops.score_antidiagonal` of one text in whole blocks, tile by tile."""
    assert causal
    assert torch.equal(q_pos, torch.arange(q.shape[2])[None])
    per_kv, tiles, per_block = q.shape[1] // k.shape[1], q.shape[2] // stride, block // stride
    scores = torch.zeros(1, q.shape[1], q.shape[2] // block, q.shape[2] // block, dtype=torch.float64)
    for head in range(q.shape[1]):
        queries, keys = q[0, head].double(), k[0, head // per_kv].double()
        for r in range(tiles):
            logits = torch.zeros(r + 1, dtype=torch.float64)
            for c in range(r + 1):
                pairs = ((r * stride + stride - 1 - j, c * stride + j) for j in range(stride))
                logits[c] = scale / stride * sum(float(queries[x] @ keys[y]) for x, y in pairs)
            for c, weight in enumerate(logits.softmax(0)):
                scores[0, head, r // per_block, c // per_block] += weight
    return scores.float()


@pytest.fixture
def literal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "score_antidiagonal", literal_scores)
