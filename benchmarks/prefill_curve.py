"""How many times faster XAttention reads a text than FlashAttention 3 does, over the length, at the paper's densities.

python benchmarks/prefill_curve.py --out benchmarks/results/prefill-curve-h200.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from decode import meta, parse
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from prefill import dense_of_others, time_of
from prefill_layers import STRIDE, layers_of, prefill, row, text

import hf_longctx as lc

K = 1024
POINTS = (
    (8, 0.4355, 2, 0.77),
    (16, 0.2891, 3, 0.78),
    (32, 0.2793, 3, 0.8),
    (64, 0.1132, 8, 0.83),
    (128, 0.0732, 13, 0.89),
    (256, 0.0732, 13, 0.92),
)
"""Thousands of tokens, the density of XAttention's table 5 (arXiv:2503.16428; stride 16; at 256K that of 128K), and the
topics and the share with which the text comes near it."""

SCORES = ("native", "int8")


@torch.no_grad()
def curve_rows(fa3: bool) -> Iterator[dict[str, Any]]:
    """A row for each length and kind of scores."""
    for size, density, topics, tau in POINTS:
        others = dense_of_others(size * K, 1, fa3)
        best = min(others, key=lambda name: others[name])
        q, k, v = text(size * K, topics)
        for scores in SCORES:
            plan = lc.XAttention(stride=STRIDE, tau=tau, dense_below=0, scores=scores).plan
            value = time_of(lambda: prefill(plan, q, k, v), 5) / layers_of(size * K)  # noqa: B023
            read = prefill(plan, q, k, v)
            case = f"XAttention in all, S=16, {size}K, the paper's {100 * density:.1f} %, {scores} scores"
            yield row(case, size * K, value, f"dense, causal, {best}", others[best], None, None, read)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed-up over length, as a PNG; beside each point the share of blocks that was read."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for scores in SCORES:
        own = [found for found in rows if found["case"].endswith(f"{scores} scores")]
        sizes, ratios = [found["shapes"]["tokens"] // K for found in own], [found["ratio"] for found in own]
        axes.plot(sizes, ratios, marker="o", label=f"xattention(stride=16, scores='{scores}')")
    for size, ratio, found in zip(sizes, ratios, own, strict=True):
        axes.annotate(f"{100 * found['density']:.1f} %", (size, ratio), textcoords="offset points", xytext=(0, 8))
    axes.axhline(1, color="grey", label=rows[0]["baseline"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size}K" for size in sizes])
    axes.set(xlabel="tokens", ylabel="times as fast", title="Attention of a prompt, 32 query and 8 KV heads")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; a PNG of the same name goes beside it")
    chosen = parse(parser)
    rows: list[dict[str, Any]] = []
    for found in curve_rows(bool(chosen.fa3)):
        print(json.dumps(found), flush=True)
        rows.append(found)
        chosen.out.write_text(json.dumps({"meta": meta(), "rows": rows}, indent=1) + "\n")
    draw(rows, chosen.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
