"""Linear layers with one-bit deltas of many tenants, at the shapes of Llama 3 8B, as JSON.

python benchmarks/delta.py linears generate --out benchmarks/results/delta-h200.json

A case is all linear layers of a decoder layer in a row, in one CUDA graph: `fused` has 4 (q, k, v together and gate, up
together), `apart` 7, as transformers has them; with deltas, those that get the same rows are one call, as hooks on a
model make it. Weights and bits of all are far more than the L2 holds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from decode import meta
from decode_layers import time_of
from delta_generate import tenant_rows
from torch import Tensor
from torch.nn.functional import linear

from hf_longctx.kernels.delta import delta_linear, joined

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
HIDDEN, INNER, KV = 4096, 14336, 1024
FUSED = ((HIDDEN + 2 * KV, HIDDEN), (HIDDEN, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER))
APART = (
    (HIDDEN, HIDDEN),
    (KV, HIDDEN),
    (KV, HIDDEN),
    (HIDDEN, HIDDEN),
    (INNER, HIDDEN),
    (INNER, HIDDEN),
    (HIDDEN, INNER),
)
TOGETHER = ((0, 1, 2), (3,), (4, 5), (6,))
"""Those of `APART` that get the same rows."""

TENANTS = 16


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of 2 GiB that a kernel writes somewhere else."""
    x, y = torch.zeros(2, 1 << 29, dtype=torch.float32, device=DEVICE)
    return 2 * x.nbytes / (time_of(lambda: torch.neg(x, out=y)) * 1e-6)


@dataclass(frozen=True)
class Layer:
    """Linear layers `[N, K]` of a decoder layer, with deltas of 16 tenants; together: which get the same rows."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    together: tuple[tuple[int, ...], ...] | None = None

    @cached_property
    def weights(self) -> list[Tensor]:
        return [torch.randn(shape, dtype=DTYPE, device=DEVICE) * 0.02 for shape in self.shapes]

    @cached_property
    def bits(self) -> list[Tensor]:
        made = torch.Generator(DEVICE).manual_seed(0)
        return [
            torch.randint(-(2**31), 2**31, (TENANTS, n, k // 32), device=DEVICE, generator=made).int()
            for n, k in self.shapes
        ]

    @cached_property
    def scales(self) -> Tensor:
        return torch.full((TENANTS, 1, 1), 0.002, device=DEVICE)

    def inputs(self, rows: int) -> list[Tensor]:
        return [torch.randn(rows, k, dtype=DTYPE, device=DEVICE) for _, k in self.shapes]

    def base(self, rows: int) -> Callable[[], Any]:
        """The layers alone."""
        x = self.inputs(rows)
        return lambda: [linear(a, w) for a, w in zip(x, self.weights, strict=True)]

    def with_deltas(self, rows: int, tenants: int) -> Callable[[], Any]:
        """The layers and their deltas: rows in equal parts of so many tenants, one after the other."""
        x, slots = self.inputs(rows), _slots(rows, tenants)
        groups = self.together or tuple((i,) for i in range(len(x)))

        def run() -> None:
            for own in groups:
                parts = [self.weights[i] for i in own], [None] * len(own), [self.bits[i] for i in own]
                if joined(x[own[0]], *parts, [self.scales] * len(own), slots) is None:
                    raise RuntimeError("no backend joins these layers")

        return run

    def deltas(self, rows: int, tenants: int) -> Callable[[], Any]:
        """The deltas alone."""
        x, slots = self.inputs(rows), _slots(rows, tenants)
        base = [torch.zeros(rows, n, dtype=DTYPE, device=DEVICE) for n, _ in self.shapes]

        def run() -> None:
            for a, y, b in zip(x, base, self.bits, strict=True):
                delta_linear(a, y, b, self.scales, slots)

        return run

    def separate(self) -> Callable[[], Any]:
        """What 16 models do: one row each, and weights of its own."""
        x = self.inputs(TENANTS)
        copies = [[w.clone() for w in self.weights] for _ in range(TENANTS)]
        return lambda: [linear(a[t : t + 1], w) for t, own in enumerate(copies) for a, w in zip(x, own, strict=True)]

    def triton(self) -> tuple[float, str]:
        """Microseconds of the deltas of 16 rows in Triton, and with which tile."""
        from delta_triton import CONFIGS, delta

        x, found = self.inputs(TENANTS), {}
        for config in CONFIGS:
            found[config] = time_of(
                lambda: [delta(a, b, self.scales, config) for a, b in zip(x, self.bits, strict=True)],  # noqa: B023
                5,
            )
        best = min(found, key=lambda config: found[config])
        return found[best], f"Triton, tl.dot on unpacked signs, tiles of {best[0]} x {best[1]}"

    def bytes(self, tenants: int) -> int:
        """Of the weights, and of the bits of so many tenants."""
        return sum(2 * n * k + tenants * n * k // 8 for n, k in self.shapes)


def _slots(rows: int, tenants: int) -> Tensor:
    return (torch.arange(rows, device=DEVICE) * tenants // rows).int()


def rows_of(layer: Layer, bandwidth: float) -> Iterator[dict[str, Any]]:
    """Lines of the table."""

    def row(case: str, value: float, baseline: str, base: float, must: str, met: bool, rows: int, tenants: int) -> Any:
        return {
            "case": f"{case}, {layer.name}",
            "value": round(value, 2),
            "unit": "us",
            "baseline": baseline,
            "baseline_value": round(base, 2),
            "ratio": round(value / base, 3),
            "floor_value": round(layer.bytes(tenants) / bandwidth * 1e6, 2),
            "must": must,
            "met": met,
            "shapes": {"rows": rows, "tenants": tenants, "linears": layer.shapes},
        }

    many = time_of(layer.with_deltas(16, 16))
    floor = layer.bytes(16) / bandwidth * 1e6
    name = "weights and 16 masks at copy bandwidth"
    yield row("decode linear, M=16, 16 tenants", many, name, floor, "<= 1.3x", many <= 1.3 * floor, 16, 16)
    one, alone = time_of(layer.with_deltas(1, 1)), time_of(layer.base(1))
    yield row("decode linear, M=1", one, "base linear", alone, "<= 1.25x", one <= 1.25 * alone, 1, 1)
    long, plain = time_of(layer.with_deltas(2048, 4), 5), time_of(layer.base(2048), 5)
    yield row("prefill, 2048 rows, 4 tenants", long, "base GEMM", plain, "<= 1.5x", long <= 1.5 * plain, 2048, 4)
    deltas = time_of(layer.deltas(16, 16))
    other, name = layer.triton()
    yield row("deltas alone, M=16, 16 tenants", deltas, name, other, "<= 1/3", 3 * deltas <= other, 16, 16)
    other = time_of(layer.separate(), 5)
    name = "16 dense bf16 GEMVs, 16 weight sets"
    yield row("decode linear, M=16, 16 tenants", many, name, other, "<= 1/5", 5 * many <= other, 16, 16)


def details(layer: Layer) -> Iterator[str]:
    """Where the time goes: of each linear by itself, as many copies of it as the L2 does not hold."""
    for rows, tenants in ((1, 1), (16, 16), (16, 1), (64, 8), (256, 4)):
        yield f"{layer.name}: {rows} rows of {tenants}: deltas {time_of(layer.deltas(rows, tenants)):.1f} us"
    for n, k in dict.fromkeys(layer.shapes):
        some = Layer("", ((n, k),) * max(2, 80_000_000 // (n * k)))
        count = len(some.shapes)
        times = [time_of(some.deltas(rows, tenants)) / count for rows, tenants in ((1, 1), (16, 16), (16, 1))]
        base = [time_of(some.base(rows)) / count for rows in (1, 16)]
        yield f"{n} x {k}: deltas of 1, 16 of 16, 16 of 1: {times} us; base of 1, 16: {base} us"


@torch.no_grad()
def main() -> None:
    """Measure, and write it down line by line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=["linears", "generate"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--details", action="store_true", help="say more")
    chosen = parser.parse_args()
    bandwidth = copy_bandwidth()
    written: dict[str, Any] = {"meta": {**meta(), "copy_bandwidth": round(bandwidth / 1e12, 3)}, "rows": []}

    def write(rows: Iterator[dict[str, Any]]) -> None:
        for row in rows:
            print(json.dumps(row), flush=True)
            written["rows"].append(row)
            chosen.out.write_text(json.dumps(written, indent=1) + "\n")

    for layer in (Layer("fused", FUSED), Layer("apart", APART, TOGETHER)) if "linears" in chosen.what else ():
        write(rows_of(layer, bandwidth))
        for line in details(layer) if chosen.details else ():
            print(line, flush=True)
    if "generate" in chosen.what:
        write(tenant_rows(bandwidth))


if __name__ == "__main__":
    main()
