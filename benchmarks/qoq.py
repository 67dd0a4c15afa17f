"""Quantized linears against bf16 ones: the time of one layer's four, as JSON.

python benchmarks/qoq.py linears --out benchmarks/results/qoq-h200.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_longctx.kernels import dispatch
from hf_longctx.kernels.compiled import library
from hf_longctx.kernels.linear import PackedWeight, quantize_norm, w4a8_linear, w4a8_linears_of

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
MUST = {1: 2.8, 16: 2.8, 64: 2.4, 256: 1.6, 2048: 1.15, 8192: 1.25}
FORMS = {"g128": (4, 128), "per channel": (4, 0), "W8A8": (8, 0)}
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
PAST_CACHE = 600 << 20
"""Bytes of weights that are read between two readings of the same one."""


def random_weight(rows: int, columns: int, bits: int, group: int) -> PackedWeight:
    """Any codes, whose values fit into int8."""
    codes = torch.randint(0, 256, (rows, columns * bits // 8), dtype=torch.uint8, device=DEVICE)
    scale, groups = torch.full((rows,), 1e-3, device=DEVICE), None
    if group:
        groups = torch.randint(1, 9, (rows // 64, columns // group, 64, 2), dtype=torch.uint8, device=DEVICE)
        groups[..., 1] = 128 - groups[..., 0] * 7
    return PackedWeight(codes, scale, None if group or bits == 8 else 8 * scale, groups, columns)


def median_time(run: Callable[[], Any], rounds: int, repeats: int = 15) -> float:
    """Microseconds of a round, of `rounds` that are replayed as a graph."""
    for _ in range(2):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    graph.replay()
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times) * 1e3 / rounds


def inputs(tokens: int) -> dict[str, Tensor]:
    """What goes into each linear."""
    return {name: torch.randn(tokens, columns, device=DEVICE, dtype=DTYPE) for name, (_, columns) in SHAPES.items()}


def layers(bytes_each: int) -> int:
    """How many layers it takes until the cache holds nothing of the first."""
    return max(2, -(-PAST_CACHE // bytes_each))


def dense_time(tokens: int) -> float:
    """Of the four linears in bf16."""
    count, x = layers(2 * sum(n * k for n, k in SHAPES.values())), inputs(tokens)
    weights = [
        {name: torch.randn(n, k, device=DEVICE, dtype=DTYPE) for name, (n, k) in SHAPES.items()} for _ in range(count)
    ]
    return median_time(lambda: [linear(x[name], w) for layer in weights for name, w in layer.items()], count)


def quantized_layers(form: str) -> list[dict[str, PackedWeight]]:
    """Enough of them to be past the cache."""
    first = {name: random_weight(*shape, *FORMS[form]) for name, shape in SHAPES.items()}
    count = layers(sum(w.nbytes for w in first.values()))
    return [first] + [{n: random_weight(*s, *FORMS[form]) for n, s in SHAPES.items()} for _ in range(count - 1)]


def quantized_time(weights: list[dict[str, PackedWeight]], tokens: int) -> float:
    """Of the four linears and the quantization of what goes into each."""
    x = inputs(tokens)

    def run() -> None:
        for layer in weights:
            for name, weight in layer.items():
                w4a8_linears_of(x[name], None, [weight], [None])

    return median_time(run, len(weights))


def fused_time(weights: list[dict[str, PackedWeight]], tokens: int) -> float:
    """The same as a layer has it: tokens come out of norms, and out of a gate."""
    x, norm = inputs(tokens), torch.ones(4096, device=DEVICE, dtype=DTYPE)

    def run() -> None:
        for layer in weights:
            w4a8_linear(quantize_norm(x["qkv"], norm, 1e-5, 0.0, True)[1], layer["qkv"], None, DTYPE)
            w4a8_linears_of(x["o"], None, [layer["o"]], [None])
            _, normed = quantize_norm(x["gate_up"], norm, 1e-5, 0.0, True)
            gate, up = w4a8_linear(normed, layer["gate_up"], None, DTYPE).chunk(2, 1)
            w4a8_linears_of(gate, up, [layer["down"]], [None])

    return median_time(run, len(weights))


def ceilings() -> tuple[float, float]:
    """Bytes per second that are read, and operations per second of bf16 products."""
    x, a = torch.ones(1 << 30, device=DEVICE, dtype=DTYPE), torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE)
    return x.nbytes / median_time(lambda: x.sum(), 1) * 1e6, 2 * 8192**3 / median_time(lambda: a @ a, 1) * 1e6


def linear_rows() -> Iterator[dict[str, Any]]:
    """A row for each form and number of tokens; and of a layer with its norms and its gate."""
    bandwidth, rate = ceilings()
    dense = {tokens: dense_time(tokens) for tokens in MUST}
    products = sum(n * k for n, k in SHAPES.values())
    for form in FORMS:
        weights = quantized_layers(form)
        read = sum(w.nbytes for w in weights[0].values())
        for tokens, must in MUST.items():
            moved = (
                read + 3 * tokens * sum(k for _, k in SHAPES.values()) + 2 * tokens * sum(n for n, _ in SHAPES.values())
            )
            floor = max(moved / bandwidth, 2 * tokens * products / (2 * rate)) * 1e6
            for kind, time in (("", quantized_time), (", with norms and gate", fused_time)):
                value = time(weights, tokens)
                ratio = dense[tokens] / value
                yield {
                    "case": f"w4a8_linear {form}, M = {tokens}{kind}",
                    "value": round(value, 2),
                    "unit": "us",
                    "baseline": "four linears in bf16, cuBLAS",
                    "baseline_value": round(dense[tokens], 2),
                    "ratio": round(ratio, 3),
                    "floor_value": round(floor, 2),
                    "must": f">= {must}x",
                    "met": ratio >= must,
                    "shapes": {"M": tokens, **{name: list(shape) for name, shape in SHAPES.items()}},
                    "layers": len(weights),
                    "backend": dispatch.last_used()["w4a8_linears_of"],
                }
        del weights
        torch.cuda.empty_cache()


def meta() -> dict[str, Any]:
    """On what this ran."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "library": library.about(),
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Run the parts that are named; write what they found, also of those before one that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["linears"])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    try:
        for _ in arguments.parts:
            for row in linear_rows():
                print(
                    f"{row['case']}: {row['value']} us, {row['ratio']}x ({row['must']}), floor {row['floor_value']}",
                    flush=True,
                )
                found.append(row)
    finally:
        arguments.out.write_text(json.dumps({"meta": meta(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
