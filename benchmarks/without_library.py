"""A GPU without the compiled library: operations in Triton, and what ran before, as JSON.

python benchmarks/without_library.py prefill steps choice xattention --out benchmarks/results/triton-h200.json, and in
the same way `mass eight` to triton-mass-h200.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import prefill_layers
import torch
from decode import meta, parse
from prefill import BLOCK, CASES, KV_HEADS, LOGITS, Q_HEADS, K, dense_of_others, kept_flops, lists, text, time_of
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_longctx.kernels import ops
from hf_longctx.kernels.dispatch import use_backend

DEVICE, DTYPE, DIM, TOKENS = torch.device("cuda"), torch.bfloat16, 128, 128 * K
MUST = {"attend_blocks, density 10 %, 128K": 380}
"""TFLOP/s on what is kept."""
SHAPES = {"rows": 1, "tokens": TOKENS, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "dim": DIM}
LOCAL = 4096
"""Tokens of InfLLM's window."""
BYTES_PER_US = 4.3e6
"""That memory moves at most."""


@dataclass(frozen=True)
class Step:
    """A call of a decode step, bytes that it must move, and what it is compared with."""

    name: str
    call: Callable[[], Any]
    moved: float
    before: Callable[[], Any]
    baseline: str


def recorded_us(calls: list[Callable[[], Any]]) -> float:
    """Median time of one of the calls, which are recorded together."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return time_of(graph.replay, 11) * 1e3 / len(calls)


def prefill_rows() -> Iterator[dict[str, Any]]:
    """TFLOP/s on what is kept."""
    q, k, v = text(TOKENS)
    whole = time_of(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), 1)
    for case in CASES:
        selection = None if case.density is None else lists(case.tokens, case.density)
        see = ops.Visibility(128, 1024) if selection is None else ops.Visibility()
        value = time_of(lambda: ops.attend_blocks(q, k, v, LOGITS, see, None, selection), 3)  # noqa: B023
        reached = kept_flops(case, selection) / value * 1e-9
        must = MUST.get(case.name)
        yield {
            "case": case.name,
            "value": round(value, 3),
            "unit": "ms",
            "tflops": round(reached, 1),
            "baseline": "dense, causal, torch",
            "baseline_value": round(whole, 3),
            "ratio": round(whole / value, 3),
            "must": None if must is None else f">= {must} TFLOP/s",
            "met": None if must is None else reached >= must,
        }


def packed(x: Tensor, bits: int) -> ops.Packed:
    """A head at a time, which needs less memory."""
    with use_backend("reference"):
        heads = [ops.encode_kv(x[:, h : h + 1], bits) for h in range(x.shape[1])]
    joined = {name: torch.cat([getattr(one, name) for one in heads], 1) for name in ("payload", "scale", "zero")}
    return replace(heads[0], **joined)


def steps() -> Iterator[Step]:
    """One row of 128K tokens."""
    q = torch.randn(1, Q_HEADS, 1, DIM, dtype=DTYPE, device=DEVICE)
    k, v = torch.randn(2, 1, KV_HEADS, TOKENS, DIM, dtype=DTYPE, device=DEVICE)
    pos = torch.full((1, 1), TOKENS - 1, device=DEVICE)
    see = ops.Visibility(q_pos=pos)

    def dense() -> Tensor:
        return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    for bits in (16, 8, 4):
        stored = (k, v) if bits == 16 else (packed(k, bits), packed(v, bits))
        moved = sum(x.nbytes for x in stored)
        yield Step(
            f"attend_pages, all keys of {bits} bits, 128K",
            lambda stored=stored: ops.attend_pages(q, *stored, LOGITS, see, None),  # type: ignore[misc]
            moved,
            dense,
            "dense of 16 bits, torch",
        )
    ids = torch.randperm(TOKENS // 16, device=DEVICE)[:256].sort().values.int().expand(1, KV_HEADS, 1, -1).contiguous()
    chosen = ops.Selection(ids, 16, 1)

    def pages() -> Tensor:
        return ops.attend_pages(q, k, v, LOGITS, see, None, chosen)

    yield Step("attend_pages, 4096 of 128K tokens, page 16", pages, 4096 * KV_HEADS * DIM * 4, pages, "reference")
    keys = torch.randn(1, KV_HEADS, TOKENS // 16, 2, DIM, dtype=DTYPE, device=DEVICE)
    bounds = torch.stack((keys.amin(3), keys.amax(3)), 3)

    def score() -> Tensor:
        return ops.score_pages(q, bounds, 1, "kv_head")

    yield Step("score_pages, 128K, page 16", score, bounds.nbytes, score, "reference")
    scores, last = score(), torch.full((1, 1), TOKENS // 16 - 1, device=DEVICE)

    def pick() -> Tensor:
        return ops.pick_blocks(scores, last, last, 1, 254, None, 1)

    yield Step("pick_blocks, 256 of 8K pages", pick, scores.nbytes, pick, "reference")
    fresh = torch.randn(2, 1, KV_HEADS, 1, DIM, dtype=DTYPE, device=DEVICE)

    def append() -> None:
        ops.append_pages(k, v, *fresh, pos, 0, None, bounds, 16)

    yield Step("append_pages, 1 token and its bounds", append, KV_HEADS * DIM * 2 * 22, append, "reference")


def prompts() -> Iterator[Step]:
    """Storing a piece of a prompt."""
    tokens, page = 16 * K, 16
    fresh = torch.randn(2, 1, tokens, KV_HEADS, DIM, dtype=DTYPE, device=DEVICE).transpose(2, 3)
    pos = torch.arange(tokens, device=DEVICE)[None]
    for bits in (16, 4):
        stores = [x.contiguous() if bits == 16 else packed(x, bits) for x in fresh]
        bounds = fresh.new_empty(1, KV_HEADS, tokens // page, 2, DIM)
        group = ops.GroupFill(*stores, 0, None, bounds, page)
        moved = fresh.nbytes * (1 + 1.5 * bits / 16) + bounds.nbytes

        def fill(group: ops.GroupFill = group) -> None:
            ops.fill_pages([group], *fresh, pos, 0, blank=True)

        yield Step(f"fill_pages, 16K tokens of {bits} bits and bounds of page 16", fill, moved, fill, "reference")


def choice_rows() -> Iterator[dict[str, Any]]:
    """Milliseconds of what XAttention chooses by, and against what ran before: products in torch, and a sort."""
    for tokens in (32 * K, TOKENS):
        q, k, pos = *prefill_layers.text(tokens, 13)[:2], torch.arange(tokens, device=DEVICE)[None]
        own = torch.arange(tokens // BLOCK, device=DEVICE)[None]
        tau = torch.full((Q_HEADS,), 0.9, device=DEVICE)
        scores = ops.score_antidiagonal(q, k, pos, BLOCK, prefill_layers.STRIDE, DIM**-0.5, True)
        calls: tuple[tuple[str, str, Callable[[], Any]], ...] = (
            (
                "score_antidiagonal, stride 16",
                "torch",
                partial(ops.score_antidiagonal, q, k, pos, BLOCK, prefill_layers.STRIDE, DIM**-0.5, True),
            ),
            ("pick_blocks, 90 %", "reference", partial(ops.pick_blocks, scores, own, own, 1, None, tau, 1)),
        )
        for name, other, call in calls:
            value = time_of(call, 3)
            with use_backend(other):
                before = time_of(call, 1)
            yield line(name, tokens, value, other, before)


def eight_rows() -> Iterator[dict[str, Any]]:
    """Milliseconds of scores of tiles that are rounded to 8 bits, against those of 16; and how alike choices are."""
    for tokens, topics in ((32 * K, 4), (TOKENS, 13)):
        q, k = prefill_layers.text(tokens, topics)[:2]
        pos = torch.arange(tokens, device=DEVICE)[None]
        score = partial(ops.score_antidiagonal, q, k, pos, BLOCK, prefill_layers.STRIDE, DIM**-0.5, True)
        before = time_of(score, 5)
        for rounded in ("fp8", "int8"):
            value = time_of(partial(score, rounded), 5)
            row = line(f"score_antidiagonal, stride 16, {rounded}", tokens, value, "16 bits, triton", before)
            alike = round(prefill_layers.alike(q, k, rounded), 4)
            yield {**row, "alike": alike, "must": ">= 0.99 alike", "met": alike >= 0.99}


def reading(tokens: int, keys: int) -> tuple[Any, ...]:
    """Lists of 512 queries in the middle of a text: its first block, some far ones, and the local window."""
    q = torch.randn(1, tokens, Q_HEADS, DIM, dtype=DTYPE, device=DEVICE).transpose(1, 2)
    k, v = torch.randn(2, 1, KV_HEADS, 2 * keys, DIM, dtype=DTYPE, device=DEVICE)
    size, start, most = min(tokens, 512), 60 * K // BLOCK * BLOCK, keys // BLOCK
    ids, pages = [], []
    for first in range(start, start + tokens, size):
        local = torch.arange((first - LOCAL + 1) // BLOCK, (first + size - 1) // BLOCK + 1)
        others = torch.randperm(int(local[0]) - 1)[: most - len(local) - 1].sort().values + 1
        ids.append(torch.cat((torch.zeros(1, dtype=torch.int64), others, local)))
        pages.append(torch.randperm(2 * most)[:most])
    lists = [torch.stack(x).int().to(DEVICE)[None, None].expand(1, KV_HEADS, -1, -1) for x in (ids, pages)]
    pos = torch.arange(start, start + tokens, device=DEVICE)[None]
    frequencies = 10000.0 ** -(torch.arange(DIM // 2, device=DEVICE) / (DIM // 2))
    turns = ops.Turns(pos, 2 * LOCAL, BLOCK, frequencies, False, LOCAL - 1)
    far = 2 + len(others) + -(-size // BLOCK)
    chosen = ops.Selection(lists[0], BLOCK, size, lists[1], far)
    return q, k, v, LOGITS, ops.Visibility(q_pos=pos), turns, chosen


def mass_rows() -> Iterator[dict[str, Any]]:
    """Microseconds of a prompt's piece of InfLLM whose keys are weighed, and of a step, against the definition."""
    for tokens in (1, 512, 2 * K):
        arguments = (*reading(tokens, 5632), LOCAL)
        value = recorded_us([partial(ops.attend_mass, *arguments)] * 4)
        with use_backend("reference"):
            before = 1e3 * time_of(partial(ops.attend_mass, *arguments), 3)
        case = f"attend_mass, {tokens} tokens, 5,632 keys at clamped distances"
        yield {**line("", tokens, value, "reference", before), "case": case, "unit": "us"}


def xattention_rows(fa3: bool) -> Iterator[dict[str, Any]]:
    """A layer of XAttention and its choice, all in Triton, against the best dense attention of others."""
    chosen = prefill_layers.SHARES
    for tokens, method, topics, least in ((32 * K, prefill_layers.WIDER, 4, None), (TOKENS, chosen, 13, 4.0)):
        others = dense_of_others(tokens, 1, fa3)
        best = min(others, key=lambda name: others[name])
        q, k, v = prefill_layers.text(tokens, topics)
        whole = partial(prefill_layers.prefill, method.plan, q, k, v)
        density = whole()
        value = time_of(whole, 3) / prefill_layers.layers_of(tokens)
        found = line("XAttention in all, S=16", tokens, value, f"dense, causal, {best}", others[best])
        met = None if least is None else found["ratio"] >= least
        yield {**found, "density": density and round(density, 4), "must": least and f">= {least:.0f}x", "met": met}
        value = time_of(partial(prefill_layers.choice, q, k, "native"), 3)
        found = line("scoring + selection, S=16", tokens, value, f"dense, causal, {best}", others[best])
        met = None if least is None else value <= 0.12 * others[best]
        yield {**found, "must": least and "<= 12 %", "met": met}


def line(case: str, tokens: int, value: float, baseline: str, before: float) -> dict[str, Any]:
    """Milliseconds, and how many times faster than the baseline that is."""
    return {
        "case": f"{case}, {tokens // K}K",
        "value": round(value, 3),
        "unit": "ms",
        "baseline": baseline,
        "baseline_value": round(before, 3),
        "ratio": round(before / value, 3),
        "floor_value": None,
        "must": None,
        "met": None,
        "shapes": {**SHAPES, "tokens": tokens},
    }


def step_rows(only: str) -> Iterator[dict[str, Any]]:
    """Microseconds of recorded calls, of those whose name begins so."""
    for step in (*steps(), *prompts()):
        if not step.name.startswith(only):
            continue
        value = recorded_us([step.call] * 4)
        with use_backend("reference"):
            before = recorded_us([step.before])
        yield {
            "case": step.name,
            "value": round(value, 2),
            "unit": "us",
            "baseline": step.baseline,
            "baseline_value": round(before, 2),
            "ratio": round(before / value, 3),
            "floor_value": round(step.moved / BYTES_PER_US, 2),
            "must": None,
            "met": None,
        }


@torch.no_grad()
def main() -> None:
    """Measure, and write it down line by line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=["prefill", "steps", "choice", "xattention", "mass", "eight"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="steps whose name begins so")
    options = parse(parser)
    written: dict[str, Any] = {"meta": meta(), "rows": []}
    rows = {
        "prefill": prefill_rows,
        "steps": partial(step_rows, options.only),
        "choice": choice_rows,
        "xattention": partial(xattention_rows, bool(options.fa3)),
        "mass": mass_rows,
        "eight": eight_rows,
    }
    with use_backend("triton"):
        for what in options.what:
            for row in rows[what]():
                print(json.dumps(row), flush=True)
                written["rows"].append({"shapes": SHAPES, **row})
                options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
