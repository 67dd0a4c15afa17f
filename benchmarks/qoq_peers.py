"""Quantized linears against other libraries' 4-bit ones: the time of one layer's four, as JSON.

python benchmarks/qoq_peers.py --out benchmarks/results/qoq-peers-h200.json

Against `humming` (humming-kernels), whose integers are ours (INT8 tokens, INT4 weights, groups of 128; symmetric, so it
reads no zero points), and its kernel for bf16 tokens; and against the 4-bit kernel that PyTorch has. Each is as its
library calls it and tunes it, from bf16 tokens to bf16 results, in one process with ours.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from qoq import DEVICE, DTYPE, SHAPES, inputs, layers, median_time, meta, quantized_layers, quantized_time
from torch import Tensor

GROUP = 128
TOKENS = (1, 16, 64, 256, 2048, 8192)
ASKED = 64
"""From this many tokens on, ours must be no slower."""

Linear = Callable[[Tensor], Tensor]


def humming(tokens: str) -> Callable[[int, int], Linear]:
    """Makes its linears for tokens of this type."""
    from humming.layer import HummingLayer

    def make(rows: int, columns: int) -> Linear:
        weight = {"dtype": "int4", "group_size": GROUP}
        layer = HummingLayer(rows, columns, weight, {"dtype": tokens}, torch_dtype=DTYPE).to(DEVICE)
        layer.load_from_unquantized(torch.randn(rows, columns, device=DEVICE, dtype=DTYPE))
        layer.transform()
        return layer

    return make


def tinygemm(rows: int, columns: int) -> Linear:
    """PyTorch's own, for bf16 tokens."""
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=DEVICE)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.full((columns // GROUP, rows, 2), 1e-3, device=DEVICE, dtype=DTYPE)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales)


PEERS: dict[str, tuple[str, Callable[[], Callable[[int, int], Linear]]]] = {
    "humming INT8 x INT4": ("humming", lambda: humming("int8")),
    "humming BF16 x INT4": ("humming", lambda: humming("bfloat16")),
    "PyTorch's BF16 x INT4": ("torch", lambda: tinygemm),
}


def peer_times(make: Callable[[int, int], Linear]) -> dict[int, float]:
    """Of a layer's four linears, for each number of tokens."""
    count = layers(sum(n * k for n, k in SHAPES.values()) // 2)
    each = [{name: make(*shape) for name, shape in SHAPES.items()} for _ in range(count)]

    def run(x: dict[str, Tensor]) -> None:
        for layer in each:
            for name, linear in layer.items():
                linear(x[name])

    return {tokens: median_time(partial(run, inputs(tokens)), count) for tokens in TOKENS}


def rows_of(names: list[str]) -> Iterator[dict[str, Any]]:
    """A row for each peer and number of tokens."""
    weights = quantized_layers("g128")
    ours = {tokens: quantized_time(weights, tokens) for tokens in TOKENS}
    del weights
    for name in names:
        module, maker = PEERS[name]
        times = peer_times(maker())
        torch.cuda.empty_cache()
        for tokens in TOKENS:
            ratio = times[tokens] / ours[tokens]
            yield {
                "case": f"w4a8_linear g128, M = {tokens}, against {name}",
                "value": round(ours[tokens], 2),
                "unit": "us",
                "baseline": f"{name}, {module} {__import__(module).__version__}",
                "baseline_value": round(times[tokens], 2),
                "ratio": round(ratio, 3),
                "floor_value": None,
                "must": ">= 1x" if tokens >= ASKED else None,
                "met": ratio >= 1 if tokens >= ASKED else None,
                "shapes": {"M": tokens, **{name: list(shape) for name, shape in SHAPES.items()}},
            }


def main() -> None:
    """Measure those that are named; write what was found line by line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    written: dict[str, Any] = {"meta": meta(), "rows": []}
    for row in rows_of(arguments.peers):
        print(f"{row['case']}: {row['value']} against {row['baseline_value']} us, {row['ratio']}x", flush=True)
        written["rows"].append(row)
        arguments.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
