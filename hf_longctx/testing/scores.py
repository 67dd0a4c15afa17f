"""How much each block of keys matters to a block of queries: one function for each scorer, query head by query head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..plan import Selector
from .scene import Scene
from .storage import read_back


def score(selector: Selector, scene: Scene, first: int, last: int, mass: Tensor) -> Tensor:
    """Score every block up to the one of the last query, before heads share.

    Args:
        selector: says how.
        scene: queries and keys.
        first: position of the first query of the block.
        last: position of the last.
        mass: `[Hkv, n]`, attention that each key got so far from the queries near it.

    Returns:
        `[Hq, M]`; a scorer that reads summaries says nothing of blocks near the queries (-inf).
    """
    scorer: Any = selector.scorer
    kind = type(scorer).__name__
    if kind == "Antidiagonal":
        return antidiagonal(scene, first, last, scorer)
    far = range(max(0, first - selector.local + 1) // selector.block)
    out = scene.q.new_full((len(scene.q), last // selector.block + 1), float("-inf"))
    for j in far:
        if kind == "UpperBound":
            assert first == last
            out[:, j] = upper_bound(scene, first, j, scorer.summary.block, scorer.summary.sub)
        else:
            out[:, j] = representative_dots(scene, first, last, j, scorer.summary, mass).amax(1)
    if kind == "RepresentativeShare" and far:
        dots = [representative_dots(scene, first, last, j, scorer.summary, mass) for j in far]  # of each [Hq, n]
        shares = torch.cat(dots, 1).mul(scene.logits.scale).softmax(1)
        for j in far:
            out[:, j] = shares[:, j * dots[j].shape[1] : (j + 1) * dots[j].shape[1]].sum(1)
    return out


def upper_bound(scene: Scene, query: int, j: int, block: int, sub: int) -> Tensor:
    """`[Hq]`: over the sub-blocks of block j, the largest product that a key within the bounds could have."""
    q = scene.q_in_text[:, query]
    bounds = []
    for start in range(j * block, (j + 1) * block, sub):
        keys = scene.k_in_text[:, start : start + sub]
        least, largest = (x.repeat_interleave(scene.per_kv, 0) for x in (keys.amin(1), keys.amax(1)))
        bounds.append(torch.maximum(q * least, q * largest).sum(-1))
    return torch.stack(bounds).amax(0)


def representative_dots(scene: Scene, first: int, last: int, j: int, summary: Any, mass: Tensor) -> Tensor:
    """`[Hq, n]`: mean product of queries `first` to `last` with each of n means of keys of block j."""
    q, k = scene.q_in_text[:, first : last + 1], scene.k_in_text
    if scene.far is not None:
        k = scene.k
        q = scene.turn(scene.q[:, first : last + 1], torch.full(q.shape[:2], scene.far))
    products = []
    for head in range(len(q)):
        kv = head // scene.per_kv
        of_block = range(j * summary.block, (j + 1) * summary.block)
        runs: list[Sequence[int]]
        bits: int | None = None
        if type(summary).__name__ == "Means":
            runs = [of_block[i : i + summary.sub] for i in range(0, summary.block, summary.sub)]
            bits = summary.bits
        else:
            runs = [sorted(of_block, key=lambda y: -float(mass[kv, y]))[: summary.count]]
        entries = torch.stack([k[kv, list(run)].mean(0) for run in runs])
        entries = entries if bits is None else read_back(entries, bits)
        products.append((entries @ q[head].T).mean(1))
    return torch.stack(products)


def antidiagonal(scene: Scene, first: int, last: int, scorer: Any) -> Tensor:
    """`[Hq, M]`: attention between tiles of queries and of keys, added up over each block of keys.

    Queries before `first` are not in the call, nor are keys after `last` in tiles that the queries may see.
    """
    block, stride = scorer.block, scorer.stride
    out = scene.q.new_zeros(len(scene.q), last // block + 1)
    for r in range(first // stride, last // stride + 1):
        q = _tile(scene.q_in_text, r, stride, first, last, scorer.rounded).flip(1)
        logits = []
        for c in range(r + 1):
            k = _tile(scene.k_in_text, c, stride, 0, last, scorer.rounded).repeat_interleave(scene.per_kv, 0)
            logits.append((q * k).sum((1, 2)) * scene.logits.scale / stride)
        shares = torch.stack(logits, 1).softmax(1)
        for c in range(r + 1):
            out[:, c * stride // block] += shares[:, c]
    return out


def _tile(x: Tensor, index: int, stride: int, first: int, last: int, rounded: str) -> Tensor:
    """`[H, stride, D]`, a tile's tokens, zero where they are not among `first` to `last`; or what 8 bits hold of it."""
    out = x.new_zeros(len(x), stride, x.shape[-1])
    for i in range(stride):
        if first <= index * stride + i <= last:
            out[:, i] = x[:, index * stride + i]
    if not rounded:
        return out
    most = {"fp8": 448.0, "int8": 127.0}[rounded]
    largest = out.float().abs().amax((1, 2), keepdim=True).clamp(min=1e-20)
    part = out.float() * (torch.full_like(largest, most) / largest)
    return (part.round() if rounded == "int8" else part.to(torch.float8_e4m3fn)).to(x.dtype) * (largest / most)
