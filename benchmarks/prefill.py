"""Prefill at the speed of tensor cores: attention over blocks, and the time to the first token, as JSON.

python benchmarks/prefill.py attention --out benchmarks/results/prefill-h200.json, and in the same way `layers` to
prefill-xattention-h200.json, `generate` to prefill-generate-h200.json, and `lengths`, `chunks` and `pieces` to files of
these names.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from decode import meta, parse
from prefill_chunks import chunk_rows, piece_rows
from prefill_flash import flash_rows
from prefill_generate import generate_rows
from prefill_layers import layer_rows
from prefill_lengths import length_rows
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hf_longctx.kernels import dispatch, ops

K = 1024
Q_HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 128
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
LOGITS = ops.Logits(DIM**-0.5)


@dataclass(frozen=True)
class Case:
    """A line of the table: causal, 32 query and 8 KV heads of 128 channels.

    Args:
        name: of the line.
        tokens: of the text.
        must: at least so many TFLOP/s on what is kept, or so many times the best dense attention.
        density: share of the causal blocks that are kept, the first and the diagonal always; None: a window.
        is_ratio: which of both `must` is.
    """

    name: str
    tokens: int
    must: float
    density: float | None
    is_ratio: bool = False


CASES = (
    Case("attend_blocks, all blocks, 128K", 128 * K, 560, 1.0),
    Case("attend_blocks, density 10 %, 128K", 128 * K, 500, 0.1),
    Case("attend_blocks, density 7.3 %, 128K", 128 * K, 500, 0.073),
    Case("streaming heads (sink 128, window 1024), 128K, all heads", 128 * K, 35, None, is_ratio=True),
)


def time_of(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median time in milliseconds, after one call that is not counted."""
    call()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def matmul_rate() -> float:
    """TFLOP/s of a bf16 product of two square matrices of 8192 rows."""
    a, b = torch.randn(2, 8192, 8192, dtype=DTYPE, device=DEVICE)
    return 2 * 8192**3 / time_of(lambda: a @ b, 20) * 1e-9


def text(tokens: int) -> list[Tensor]:
    """Queries, keys and values as a model makes them: heads of a token side by side."""
    heads = (Q_HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(1, tokens, n, DIM, dtype=DTYPE, device=DEVICE).transpose(1, 2) for n in heads]


@cache
def dense_of_others(tokens: int, calls: int, fa3: bool) -> dict[str, float]:
    """Milliseconds of causal attention over so many tokens, by who computes it; each of so many calls in a row."""
    q, k, v = text(tokens)
    found = {}

    def each(call: Callable[[], Any]) -> float:
        return time_of(lambda: [call() for _ in range(calls)], 3) / calls

    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        with sdpa_kernel(backend):
            found[backend.name] = each(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    if fa3:
        moved = [x.transpose(1, 2) for x in (q, k, v)]
        found["FA3"] = each(lambda: torch.ops.flash_attn_3.fwd(*moved, softmax_scale=DIM**-0.5, is_causal=True))
    print(tokens, calls, found, flush=True)
    return found


def lists(tokens: int, density: float) -> ops.Selection:
    """For each query head and block of queries the first block, its own, and random others between."""
    blocks = tokens // BLOCK
    n = torch.arange(blocks, device=DEVICE)
    count = (density * (n + 1)).ceil().clamp(min=2).minimum(n + 1)
    rows = []
    for _ in range(Q_HEADS):
        rank = torch.rand(blocks, blocks, device=DEVICE).masked_fill_(n[None] > n[:, None], -1.0)
        rank[:, 0] = 2.0
        rank.fill_diagonal_(2.0)
        ids = rank.argsort(1, descending=True)[:, : int(count.max())]
        ids.masked_fill_(torch.arange(ids.shape[1], device=DEVICE)[None] >= count[:, None], blocks)
        ids = ids.sort(1).values
        rows.append(ids.masked_fill_(ids == blocks, -1).int())
    return ops.Selection(torch.stack(rows)[None], BLOCK, BLOCK)


def kept_flops(case: Case, selection: ops.Selection | None) -> float:
    """Of the pairs of a query and a key that it sees."""
    if selection is None:
        at = torch.arange(case.tokens, dtype=torch.float64)
        pairs = Q_HEADS * float((at + 1).clamp(max=128 + 1024).sum())
    else:
        blocks = int((selection.ids >= 0).sum())
        diagonal = Q_HEADS * (case.tokens // BLOCK)
        pairs = (blocks - diagonal) * BLOCK**2 + diagonal * BLOCK * (BLOCK + 1) / 2
    return 4 * DIM * pairs


@torch.no_grad()
def attention_rows(fa3: bool) -> Iterator[dict[str, Any]]:
    """A row for each line."""
    rate = matmul_rate()
    print(f"matmul {rate:.0f} TFLOP/s", flush=True)
    for case in CASES:
        others = dense_of_others(case.tokens, 1, fa3)
        best = min(others, key=lambda name: others[name])
        q, k, v = text(case.tokens)
        selection = None if case.density is None else lists(case.tokens, case.density)
        see = ops.Visibility(128, 1024) if selection is None else ops.Visibility()
        value = time_of(lambda: ops.attend_blocks(q, k, v, LOGITS, see, None, selection))  # noqa: B023
        flops = kept_flops(case, selection)
        ratio, reached = others[best] / value, flops / value * 1e-9
        yield {
            "case": case.name,
            "value": round(value, 3),
            "unit": "ms",
            "tflops": round(reached, 1),
            "density": None if case.density is None else round(flops / (2 * DIM * Q_HEADS * case.tokens**2), 4),
            "baseline": f"dense, causal, {best}",
            "baseline_value": round(others[best], 3),
            "ratio": round(ratio, 3),
            "floor_value": round(flops / rate * 1e-9, 3),
            "must": f">= {case.must}x" if case.is_ratio else f">= {case.must} TFLOP/s",
            "met": (ratio if case.is_ratio else reached) >= case.must,
            "shapes": {"rows": 1, "tokens": case.tokens, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "dim": DIM},
            "backends": dispatch.last_used(),
        }


def main() -> None:
    """Measure, and write it down line by line."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = ["attention", "layers", "generate", "lengths", "chunks", "pieces", "flash"]
    parser.add_argument("what", nargs="+", choices=names)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128 * K], help="of prompts to generate() from")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parse(parser)
    fa3 = bool(chosen.fa3)
    rows = {
        "attention": lambda: attention_rows(fa3),
        "layers": lambda: layer_rows(time_of, partial(dense_of_others, fa3=fa3)),
        "generate": lambda: generate_rows(chosen.tokens),
        "lengths": length_rows,
        "chunks": lambda: chunk_rows(text, fa3),
        "pieces": lambda: piece_rows(chosen.tokens[0]),
        "flash": lambda: flash_rows(text),
    }
    written: dict[str, Any] = {"meta": meta(), "rows": []}
    for what in chosen.what:
        for row in rows[what]():
            print(json.dumps(row), flush=True)
            written["rows"].append(row)
            chosen.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
