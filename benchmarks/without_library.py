"""A GPU without the compiled library: operations in Triton, and what ran before, as JSON.

python benchmarks/without_library.py --out benchmarks/results/triton-h200.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from decode import meta
from prefill import CASES, KV_HEADS, LOGITS, Q_HEADS, K, kept_flops, lists, text, time_of
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_longctx.kernels import ops
from hf_longctx.kernels.dispatch import use_backend

DEVICE, DTYPE, DIM, TOKENS = torch.device("cuda"), torch.bfloat16, 128, 128 * K
MUST = {"attend_blocks, density 10 %, 128K": 380}
"""TFLOP/s on what is kept."""
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
    """Milliseconds of the scores that XAttention chooses by, in torch; those of 32K tokens, as the reference waits."""
    for tokens in (32 * K, TOKENS):
        q, k, _ = text(tokens)
        pos = torch.arange(tokens, device=DEVICE)[None]
        times = {}
        for backend in ("torch", "reference") if tokens < TOKENS else ("torch",):
            with use_backend(backend):
                call = lambda: ops.score_antidiagonal(q, k, pos, 128, 16, DIM**-0.5, True)  # noqa: B023, E731
                times[backend] = time_of(call, 3)
        before = times.get("reference")
        yield {
            "case": f"score_antidiagonal, stride 16, {tokens // K}K, torch",
            "value": round(times["torch"], 3),
            "unit": "ms",
            "baseline": before and "reference",
            "baseline_value": before and round(before, 3),
            "ratio": before and round(before / times["torch"], 3),
            "must": None,
            "met": None,
        }


def step_rows() -> Iterator[dict[str, Any]]:
    """Microseconds of recorded calls."""
    for step in (*steps(), *prompts()):
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
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    written: dict[str, Any] = {"meta": meta(), "rows": []}
    shapes = {"rows": 1, "tokens": TOKENS, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "dim": DIM}
    with use_backend("triton"):
        for rows in (prefill_rows, step_rows, choice_rows):
            for row in rows():
                print(json.dumps(row), flush=True)
                written["rows"].append({**row, "shapes": shapes})
                out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
