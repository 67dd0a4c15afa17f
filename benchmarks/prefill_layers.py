"""Prefill of attention layers through the package's own attention function, against dense attention of others.

Some layers follow each other in each piece of the text, as in a model, so that the host is ahead of the device but for
the first; the time of one is the time of all over their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from decode_layers import DEVICE, DIM, DTYPE, KV_HEADS, Q_HEADS, facts
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import hf_longctx as lc
from hf_longctx.attention import attention
from hf_longctx.cache.cache import LongContextCache
from hf_longctx.cache.step import Step
from hf_longctx.context import Forward
from hf_longctx.kernels import ops
from hf_longctx.prompt import PIECE

K, BLOCK, STRIDE = 1024, 128, 16
MOST_LAYERS, LEAST_LAYERS, TOKENS = 16, 4, 512 * K
"""Layers of a short text, of a long one, and between them as many as have so many tokens together."""

GATES = [[float(head % 2) for head in range(KV_HEADS)]] * LEAST_LAYERS


def layers_of(tokens: int) -> int:
    """How many layers read a text."""
    return max(LEAST_LAYERS, min(MOST_LAYERS, TOKENS // tokens))


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Args:
        name: of the line.
        tokens: of the text.
        method: of the package.
        must: at least so many times faster than the best dense attention of others, or than the dense plan; None: as it
            comes.
        topics: blocks of one topic pay attention to each other: so many topics make a density of about 0.9 of one by
            that many. 0: none, every block pays as much to every other.
        of_dense_plan: the baseline is the dense plan.
    """

    name: str
    tokens: int
    method: Any
    must: float | None
    topics: int = 0
    of_dense_plan: bool = False


SHARES = lc.XAttention(stride=STRIDE, tau=0.89, dense_below=0)
WIDER = replace(SHARES, tau=0.925)
LINES = (
    *(
        Line(
            f"XAttention in all, S=16, {size} at {density} %, {scores} scores",
            tokens,
            replace(method, scores=scores),
            must,
            topics,
        )
        for size, tokens, density, method, must, topics in (
            ("8K", 8 * K, 43, replace(SHARES, tau=0.77), None, 2),
            ("16K", 16 * K, 29, replace(SHARES, tau=0.78), None, 3),
            ("32K", 32 * K, 25, WIDER, 2.6, 4),
            ("128K", 128 * K, 7.3, SHARES, 6.5, 13),
            ("256K", 256 * K, 7.3, SHARES, 6.5, 13),
        )
        for scores in ("native", "fp8", "int8")
    ),
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
    count = layers_of(q.shape[2])
    of = facts(count)
    plan = plan_of(of)
    cache, modules = LongContextCache(plan), [SimpleNamespace(layer_idx=layer) for layer in range(count)]
    for first in range(0, q.shape[2], PIECE):
        last = min(first + PIECE, q.shape[2])
        step = replace(Step.of(first, last - first, DEVICE, None, None), expected=q.shape[2])
        forward = Forward(of, plan, step, cache)
        for module in modules:
            attention(module, *(x[:, :, first:last] for x in (q, k, v)), None, hf_longctx=forward)  # type: ignore[arg-type]
        cache.ledger.rows, cache.ledger.columns = 1, last
    return cache.ledger.density("prefill")


def choice(q: Tensor, k: Tensor, scores: str) -> Tensor:
    """All that is done before blocks are read: scores, and the blocks that hold nine tenths of them; returns these."""
    blocks = q.shape[2] // BLOCK
    own, pos = torch.arange(blocks, device=DEVICE)[None], torch.arange(q.shape[2], device=DEVICE)[None]
    rounded = "" if scores == "native" else scores
    found = ops.score_antidiagonal(q, k, pos, BLOCK, STRIDE, DIM**-0.5, True, rounded)
    return ops.pick_blocks(found, own, own, 1, None, torch.full((Q_HEADS,), 0.9, device=DEVICE), 1)


def alike(q: Tensor, k: Tensor, scores: str) -> float:
    """Of the blocks that are chosen with tiles as they are, or rounded to 8 bits, the share that are in both cases."""
    chosen = []
    for kind in ("native", scores):
        ids = choice(q, k, kind).long()
        marks = torch.zeros(*ids.shape[:3], ids.shape[3] + 1, dtype=torch.bool, device=DEVICE)
        chosen.append(marks.scatter_(3, ids % marks.shape[3], True)[..., :-1])  # -1 marks the last, which is no block
    return float((chosen[0] & chosen[1]).sum() / (chosen[0] | chosen[1]).sum())


def busy_of(call: Callable[[], Any]) -> float:
    """Milliseconds that the GPU works in a call: of a short text the host takes longer, if it does nothing else."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.device_time for event in seen.events() if event.device_type == DeviceType.CUDA) / 1000


@torch.no_grad()
def layer_rows(
    time_of: Callable[[Callable[[], Any], int], float], dense_of_others: Callable[[int, int], dict[str, float]]
) -> Iterator[dict[str, Any]]:
    """A row for each line, against one call of the best dense attention; beside it what that takes in as many calls.

    Args:
        time_of: milliseconds of a call.
        dense_of_others: milliseconds of causal attention over so many tokens, by who computes it, each of so many calls
            in a row: after some of them the GPU's clock is lower, as it is after some layers.
    """
    for line in LINES:
        count = layers_of(line.tokens)
        others = dense_of_others(line.tokens, 1)
        best = min(others, key=lambda name: others[name])
        q, k, v = text(line.tokens, line.topics)
        value = time_of(lambda: prefill(line.method.plan, q, k, v), 3) / count  # noqa: B023
        read = prefill(line.method.plan, q, k, v)
        base, name = others[best], f"dense, causal, {best}"
        if line.of_dense_plan:
            base, name = time_of(lambda: prefill(lc.Dense().plan, q, k, v), 3) / count, "the dense plan"  # noqa: B023
        must, met = (None, None) if line.must is None else (f">= {line.must}x", base / value >= line.must)
        found = row(line.name, line.tokens, value, name, base, must, met, read)
        if count > LEAST_LAYERS:
            each = min(dense_of_others(line.tokens, count).values())
            found |= {"baseline_in_a_row": round(each, 3), "ratio_in_a_row": round(each / value, 3)}
            found["busy"] = round(busy_of(lambda: prefill(line.method.plan, q, k, v)) / count, 4)  # noqa: B023
        yield found
        if line.tokens == 128 * K and line.topics:
            taken = time_of(lambda: choice(q, k, line.method.scores), 3)  # noqa: B023
            yield from _choice_rows(line, q, k, taken, name, base)


def _choice_rows(line: Line, q: Tensor, k: Tensor, value: float, name: str, base: float) -> Iterator[dict[str, Any]]:
    """That it takes `value` milliseconds to choose, and how much rounding changes the choice."""
    scores = line.method.scores
    case = f"scoring + selection, S=16, 128K, {scores} scores"
    yield row(case, line.tokens, value, name, base, "<= 5.5 %", value <= 0.055 * base, None)
    if scores != "native":
        share, case = alike(q, k, scores), f"blocks chosen with native and {scores} scores, S=16, 128K"
        found = row(case, line.tokens, share, "all chosen with either", 1.0, ">= 0.99", share >= 0.99, None)
        yield {**found, "unit": "share"}


def row(
    case: str,
    tokens: int,
    value: float,
    baseline: str,
    base: float,
    must: str | None,
    met: bool | None,
    read: float | None,
) -> dict[str, Any]:
    """A line of a table: milliseconds, and how many times faster than the baseline that is."""
    return {
        "case": case,
        "value": round(value, 4),
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
