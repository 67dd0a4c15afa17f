"""Attention of one row and one group of heads, one block of queries after another."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import HeadPolicy, Selector
from .choice import Choice
from .scene import Scene
from .visible import Span


def attend(scene: Scene, policy: HeadPolicy) -> tuple[Tensor, Tensor]:
    """Attention of a group of heads: `[Hq, n, Dv]`, and which keys each query read, `[Hq, n, n]`, bool."""
    heads, tokens = scene.q.shape[:2]
    out = scene.q.new_zeros(heads, tokens, scene.v.shape[-1])
    reads = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    mass = scene.k.new_zeros(len(scene.k), tokens)  # attention that each key got so far from the queries near it
    choice = Choice(scene)
    for span in scene.spans:
        selector = policy.decode if span.decode else policy.prefill
        if not span.decode:
            choice.forget()
        for first, last in _query_blocks(span, selector):
            queries = slice(first, last + 1)
            reads[:, queries] = scene.at[queries] >= 0
            if selector is not None:
                reads[:, queries] &= choice.keys(selector, span.decode, first, last, mass)[:, None]
            for head in range(len(scene.k)):
                mine = slice(head * scene.per_kv, (head + 1) * scene.per_kv)
                weights = scene.weights(head, first, last, reads[mine, queries])
                out[mine, queries] = weights @ scene.v[head]
                if selector is not None:
                    mass[head] += _from_near(weights.sum(0), first, selector.local)
    return out, reads


def _query_blocks(span: Span, selector: Selector | None) -> list[tuple[int, int]]:
    """First and last positions of the blocks of queries of a call that read the same keys."""
    if selector is None:
        return [(span.first, span.last)]
    size = 1 if span.decode else selector.scorer.q_block
    starts = range(span.first // size * size, span.last + 1, size)
    return [(max(start, span.first), min(start + size - 1, span.last)) for start in starts]


def _from_near(weights: Tensor, first: int, local: int) -> Tensor:
    """`[n]`, the sum of weights `[queries, n]` over the queries that stand less than `local` after the key."""
    distance = torch.arange(first, first + len(weights))[:, None] - torch.arange(weights.shape[1])
    return (weights * (distance < local)).sum(0)
