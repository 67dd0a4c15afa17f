"""Prefill of attention layers through the package's own attention function, against dense attention of others.

Some layers follow each other in each piece of the text, as in a model, so that the host is ahead of the device; the
time of one is the time of all over their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from decode_layers import DEVICE, DIM, DTYPE, KV_HEADS, Q_HEADS, facts
from torch import Tensor

import hf_longctx as lc
from hf_longctx.attention import attention
from hf_longctx.cache.cache import LongContextCache
from hf_longctx.cache.step import Step
from hf_longctx.context import Forward
from hf_longctx.kernels import ops
from hf_longctx.prompt import PIECE

K, BLOCK, STRIDE = 1024, 128, 16
LAYERS = 4
GATES = [[float(head % 2) for head in range(KV_HEADS)]] * LAYERS


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Args:
        name: of the line.
        tokens: of the text.
        method: of the package.
        must: at least so many times faster than the best dense attention of others, or than the dense plan.
        topics: blocks of one topic pay attention to each other: so many topics make a density of about 0.9 of one by
            that many. 0: none, every block pays as much to every other.
        of_dense_plan: the baseline is the dense plan.
    """

    name: str
    tokens: int
    method: Any
    must: float
    topics: int = 0
    of_dense_plan: bool = False


SHARES = lc.XAttention(stride=STRIDE, tau=0.9, dense_below=0)
EIGHT = replace(SHARES, scores="fp8")
WIDER = replace(SHARES, tau=0.95)
LINES = (
    Line("XAttention in all, S=16, 32K at 25 %", 32 * K, WIDER, 2.6, topics=4),
    Line("XAttention in all, S=16, fp8, 32K at 25 %", 32 * K, replace(WIDER, scores="fp8"), 2.6, topics=4),
    Line("XAttention in all, S=16, 128K at 7.3 %", 128 * K, SHARES, 6.5, topics=12),
    Line("XAttention in all, S=16, fp8, 128K at 7.3 %", 128 * K, EIGHT, 6.5, topics=12),
    Line("XAttention in all, S=16, 256K at 7.3 %", 256 * K, SHARES, 6.5, topics=12),
    Line("XAttention in all, S=16, fp8, 256K at 7.3 %", 256 * K, EIGHT, 6.5, topics=12),
    Line("Duo 50 %, 128K", 128 * K, lc.DuoAttention(pattern=GATES, sparsity=0.5), 1.8, of_dense_plan=True),
)


def text(tokens: int, topics: int) -> list[Tensor]:
    """Queries, keys and values of heads in which blocks of one topic pay attention to each other."""
    made = torch.Generator(DEVICE).manual_seed(0)
    blocks = tokens // BLOCK
    out = []
    for heads, loud in ((Q_HEADS, 1.0), (KV_HEADS, 1.0), (KV_HEADS, 0.0)):
        x = torch.randn(1, heads, tokens, DIM, dtype=DTYPE, device=DEVICE, generator=made)
        if topics and loud:
            each = torch.Generator(DEVICE).manual_seed(1)  # one and the same for queries and keys
            ways = torch.randn(KV_HEADS, topics, DIM, dtype=DTYPE, device=DEVICE, generator=each)
            topic = torch.randint(topics, (KV_HEADS, blocks), device=DEVICE, generator=each)
            way = ways.gather(1, topic[..., None].expand(-1, -1, DIM))  # [Hkv, blocks, D]
            x.view(1, KV_HEADS, -1, blocks, BLOCK, DIM).add_(way[:, None, :, None])
        out.append(x.transpose(1, 2).contiguous().transpose(1, 2))  # heads of a token side by side, as a model has them
    return out


def prefill(plan_of: Callable[[Any], Any], q: Tensor, k: Tensor, v: Tensor) -> float | None:
    """Layers read a text in the pieces in which `generate()` would; returns the share of blocks that they read."""
    of = facts(LAYERS)
    plan = plan_of(of)
    cache, modules = LongContextCache(plan), [SimpleNamespace(layer_idx=layer) for layer in range(LAYERS)]
    for first in range(0, q.shape[2], PIECE):
        last = min(first + PIECE, q.shape[2])
        step = replace(Step.of(first, last - first, DEVICE, None, None), expected=q.shape[2])
        forward = Forward(of, plan, step, cache)
        for module in modules:
            attention(module, *(x[:, :, first:last] for x in (q, k, v)), None, hf_longctx=forward)  # type: ignore[arg-type]
        cache.ledger.rows, cache.ledger.columns = 1, last
    return cache.ledger.density("prefill")


def choice(q: Tensor, k: Tensor, fp8: bool) -> Tensor:
    """All that is done before blocks are read: scores, and the blocks that hold nine tenths of them; returns these."""
    blocks = q.shape[2] // BLOCK
    own, pos = torch.arange(blocks, device=DEVICE)[None], torch.arange(q.shape[2], device=DEVICE)[None]
    scores = ops.score_antidiagonal(q, k, pos, BLOCK, STRIDE, DIM**-0.5, True, fp8)
    return ops.pick_blocks(scores, own, own, 1, None, torch.full((Q_HEADS,), 0.9, device=DEVICE), 1)


def alike(q: Tensor, k: Tensor) -> float:
    """Of the blocks that 16 or 8 bits choose, the share that both do."""
    chosen = []
    for fp8 in (False, True):
        ids = choice(q, k, fp8).long()
        marks = torch.zeros(*ids.shape[:3], ids.shape[3] + 1, dtype=torch.bool, device=DEVICE)
        chosen.append(marks.scatter_(3, ids % marks.shape[3], True)[..., :-1])  # -1 marks the last, which is no block
    return float((chosen[0] & chosen[1]).sum() / (chosen[0] | chosen[1]).sum())


@torch.no_grad()
def layer_rows(
    time_of: Callable[[Callable[[], Any], int], float], dense_of_others: Callable[[int], dict[str, float]]
) -> Iterator[dict[str, Any]]:
    """A row for each line.

    Args:
        time_of: milliseconds of a call.
        dense_of_others: milliseconds of causal attention over so many tokens, by who computes it.
    """
    for line in LINES:
        others = dense_of_others(line.tokens)
        best = min(others, key=lambda name: others[name])
        q, k, v = text(line.tokens, line.topics)
        value = time_of(lambda: prefill(line.method.plan, q, k, v), 3) / LAYERS  # noqa: B023
        read = prefill(line.method.plan, q, k, v)
        base, name = others[best], f"dense, causal, {best}"
        if line.of_dense_plan:
            base, name = time_of(lambda: prefill(lc.Dense().plan, q, k, v), 3) / LAYERS, "the dense plan"  # noqa: B023
        yield _row(line.name, line.tokens, value, name, base, f">= {line.must}x", base / value >= line.must, read)
        if line.tokens == 128 * K and line.topics:
            fp8 = line.method is EIGHT
            value = time_of(lambda: choice(q, k, fp8), 3)  # noqa: B023
            met, case = value <= 0.055 * base, f"scoring + selection, S=16,{' fp8,' * fp8} 128K"
            yield _row(case, line.tokens, value, name, base, "<= 5.5 %", met, read)
        if line.tokens == 128 * K and line.method is EIGHT:
            share = alike(q, k)
            row = _row(
                "blocks chosen alike, fp8 and bf16, S=16, 128K",
                line.tokens,
                share,
                "bf16",
                1.0,
                ">= 0.99",
                share >= 0.99,
                read,
            )
            yield {**row, "unit": "Jaccard"}


def _row(
    case: str, tokens: int, value: float, baseline: str, base: float, must: str, met: bool, read: float | None
) -> dict[str, Any]:
    return {
        "case": case,
        "value": round(value, 3),
        "unit": "ms",
        "density": read and round(read, 4),
        "baseline": baseline,
        "baseline_value": round(base, 3),
        "ratio": round(base / value, 3),
        "floor_value": None,
        "must": must,
        "met": met,
        "shapes": {"rows": 1, "tokens": tokens, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "dim": DIM},
    }
