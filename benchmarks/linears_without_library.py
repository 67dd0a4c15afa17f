"""A GPU without the compiled library: linears with one-bit deltas, and quantized tokens, in Triton, as JSON.

python benchmarks/linears_without_library.py --out benchmarks/results/triton-linears-h200.json

Linears are those of a decoder layer of Llama 3 8B's shape, as in `delta.py`, recorded; but for the definition, which
waits for the slots of rows and is timed as it runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from decode import meta
from decode_layers import time_of
from delta import APART, DEVICE, DTYPE, HIDDEN, INNER, TOGETHER, Layer, copy_bandwidth

from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.linear import quantize_tokens


def once(call: Callable[[], Any]) -> float:
    """Microseconds of the second call, the host's time included."""
    call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6


def row(
    case: str, value: float, baseline: str, before: float, floor: float, shapes: dict[str, Any], **more: float
) -> dict[str, Any]:
    """A line, of microseconds."""
    return {
        "case": case,
        "value": round(value, 2),
        "unit": "us",
        "baseline": baseline,
        "baseline_value": round(before, 2),
        "ratio": round(before / value, 3),
        "floor_value": round(floor, 2),
        **{name: round(own, 2) for name, own in more.items()},
        "must": None,
        "met": None,
        "shapes": shapes,
    }


def delta_rows(bandwidth: float) -> Iterator[dict[str, Any]]:
    """With the base's products and without them; of many rows there is one product."""
    layer = Layer("apart", APART, TOGETHER)
    for rows, tenants in ((1, 1), (16, 16), (2048, 4)):
        shapes, repeats = {"rows": rows, "tenants": tenants, "linears": APART}, 3 if rows > 16 else 9
        with use_backend("reference"):
            before = once(layer.deltas(rows, tenants))
        base = time_of(layer.base(rows), repeats)
        for name, make in (("with deltas", layer.with_deltas), ("deltas alone", layer.deltas)):
            if make == layer.deltas and rows > 16:
                continue  # they are never computed alone of so many
            value = time_of(make(rows, tenants), repeats)
            with use_backend("compiled"):
                library = time_of(make(rows, tenants), repeats)
            bytes_ = layer.bytes(tenants) - (layer.bytes(0) if make == layer.deltas else 0)
            case = f"linears of a layer, {rows} rows of {tenants}, {name}"
            more = {"library_value": library, "base_value": base}
            yield row(case, value, "reference, deltas alone", before, bytes_ / bandwidth * 1e6, shapes, **more)


def token_rows(bandwidth: float) -> Iterator[dict[str, Any]]:
    """Tokens of 8 bits."""
    for rows in (16, 2048):
        for channels in (HIDDEN, INNER):
            x = torch.randn(rows, channels, dtype=DTYPE, device=DEVICE)

            def call(x: torch.Tensor = x) -> None:
                for _ in range(4):
                    quantize_tokens(x)

            times = {}
            for backend in ("triton", "reference", "compiled"):
                with use_backend(backend):
                    times[backend] = time_of(call, 9) / 4
            shapes, floor = {"rows": rows, "channels": channels}, x.numel() * 3 / bandwidth * 1e6
            case = f"quantize_tokens, {rows} of {channels} channels"
            library = times["compiled"]
            yield row(case, times["triton"], "reference", times["reference"], floor, shapes, library_value=library)


@torch.no_grad()
def main() -> None:
    """Measure, and write it down line by line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    bandwidth = copy_bandwidth()
    written: dict[str, Any] = {"meta": {**meta(), "copy_bandwidth": round(bandwidth / 1e12, 3)}, "rows": []}
    with use_backend("triton"):
        for rows in (delta_rows, token_rows):
            for found in rows(bandwidth):
                print(json.dumps(found), flush=True)
                written["rows"].append(found)
                out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
