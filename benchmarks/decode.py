"""Decode at the speed of memory: time of an attention layer's step, and of a token of `generate()`, as JSON.

python benchmarks/decode.py layers generate --out benchmarks/results/decode-h200.json
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import json
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from decode_generate import generate_rows
from decode_layers import DIM, KV_HEADS, Layers, Shape, dense_of_others, read_bandwidth

import hf_longctx as lc
from hf_longctx.kernels import dispatch
from hf_longctx.kernels.compiled import library
from hf_longctx.patch import plan_for

K = 1024


@dataclass(frozen=True)
class Case:
    """A line of the table of attention layers.

    Args:
        name: of the line.
        method: of the package.
        shape: rows and tokens.
        read: bytes that a step must read.
        must: as a number: at most so many microseconds, or at least so many times the best dense attention.
        is_ratio: which of both.
        kv: as in `patch`.
        refresh_every: decode steps from one choice of blocks to the next.
    """

    name: str
    method: Any
    shape: Shape
    read: int
    must: float
    is_ratio: bool = False
    kv: Any = None
    refresh_every: int = 1


def quest(shape: Shape, budget: int) -> int:
    """Bytes that a step of Quest reads: two bounds of each page of 16, and the pages chosen."""
    entries = 2 * 2 * shape.rows * (shape.tokens // 16) * KV_HEADS * DIM
    return entries + Shape(shape.rows, budget).bytes


def cases() -> Iterator[Case]:
    """The lines of the table, those of a shape together."""
    for rows, packed in ((1, 2.6), (8, 3.2)):
        shape = Shape(rows, 128 * K)
        few = shape.bytes * (DIM // 2 + 4) // (2 * DIM)
        yield Case(f"attend_pages dense, 128K, B={rows}", lc.Dense(), shape, shape.bytes, 1 / 1.05, is_ratio=True)
        yield Case(f"KV int4 dense, 128K, B={rows}", lc.Dense(), shape, few, packed, is_ratio=True, kv="int4")
        recent = lc.Int4KV(recent=64)
        name = f"KV int4 dense, the last 64 tokens as they are, 128K, B={rows}"
        yield Case(name, lc.Dense(), shape, few, 0.9 * packed, is_ratio=True, kv=recent)
    long, eight, short = Shape(1, 128 * K), Shape(8, 128 * K), Shape(1, 32 * K)
    every = lc.Quest(4096, page=16, dense_layers=0)
    yield Case("Quest, page 16, budget 4096, 128K, B=1", every, long, quest(long, 4096), 24)
    fourth = (quest(long, 4096) + 3 * Shape(1, 4096).bytes) // 4
    pages = lc.LServe(sparsity=0.0, page=16, logical=16, kv="native", refresh_every=4, pattern="all")
    yield Case("the same, refresh_every=4, averaged", pages, long, fourth, 14, refresh_every=4)
    yield Case("Quest B=8", every, eight, quest(eight, 4096), 140)
    yield Case("Quest 32K, budget 2048, B=1", lc.Quest(2048, page=16, dense_layers=0), short, quest(short, 2048), 13)
    half = Shape(1, (4096 + 384) // 2).bytes * (DIM // 2 + 4) // (2 * DIM) + quest(long, 0) // 8
    yield Case(
        "LServe decode layer, 128K, B=1", lc.LServe(pattern="half", kv="int4"), long, half, 8, True, refresh_every=4
    )


def layer_rows(fa3: bool, only: str) -> Iterator[dict[str, Any]]:
    """A row for each line whose name has `only` in it."""
    bandwidth, dense = read_bandwidth(), {}
    for case in cases():
        if only not in case.name:
            continue
        if case.shape not in dense:
            dense[case.shape] = dense_of_others(case.shape, fa3)
            print(case.shape, dense[case.shape])
        best = min(dense[case.shape], key=dense[case.shape].get)
        layers = Layers(lambda facts, case=case: _plan(facts, case), case.shape, case.read)
        value = layers.time(case.refresh_every)
        ratio = dense[case.shape][best] / value
        yield {
            "case": case.name,
            "value": round(value, 2),
            "unit": "us",
            "baseline": f"dense, bf16, {best}",
            "baseline_value": round(dense[case.shape][best], 2),
            "ratio": round(ratio, 3),
            "floor_value": round(case.read / bandwidth * 1e6, 2),
            "must": f">= {case.must:.3g}x" if case.is_ratio else f"<= {case.must:.3g} us",
            "met": ratio >= case.must if case.is_ratio else value <= case.must,
            "shapes": {
                "rows": case.shape.rows,
                "tokens": case.shape.tokens,
                "q_heads": 32,
                "kv_heads": KV_HEADS,
                "dim": DIM,
            },
            "kv_bytes": layers.kv_bytes,
            "layers": layers.layers,
            "backends": dispatch.last_used(),
        }
        del layers
        gc.collect()
        torch.cuda.empty_cache()


def _plan(facts: Any, case: Case) -> Any:
    """The case's plan; half of the heads of every layer stream where its pattern says so."""
    method = case.method
    if isinstance(method, lc.LServe):
        gates = [
            [1.0 if method.pattern == "all" or head % 2 else 0.0 for head in range(KV_HEADS)] for _ in facts.layers
        ]
        method = lc.LServe(**{**vars(method), "pattern": gates})
    return plan_for(facts, method, kv=case.kv)


def meta() -> dict[str, Any]:
    """On what this ran."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "library": library.about(),
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Arguments of a benchmark that may have FlashAttention 3 as a baseline, which is loaded then."""
    parser.add_argument("--fa3", type=Path, nargs=2, help="libcudart.so.12 and FlashAttention 3's library, a baseline")
    chosen = parser.parse_args()
    if chosen.fa3:
        ctypes.CDLL(str(chosen.fa3[0]), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(chosen.fa3[1]))
    return chosen


def main() -> None:
    """Measure what is asked for, and write it down line by line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=["layers", "generate"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help="lines of layers whose name has this in it")
    chosen = parse(parser)
    written: dict[str, Any] = {"meta": meta(), "rows": []}
    for what in chosen.what:
        for row in layer_rows(bool(chosen.fa3), chosen.only) if what == "layers" else generate_rows():
            print(json.dumps(row), flush=True)
            written["rows"].append(row)
            chosen.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
