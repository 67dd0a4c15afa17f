"""Two hours of stream, 7,200 rounds, as fast as they go: bytes held and what a round takes, from the first to the last.

python benchmarks/stream_two_hours.py --out benchmarks/results/stream-two-hours-tiny-cpu.json

A tiny random Qwen2.5-VL watches half a minute of Big Buck Bunny ((c) Blender Foundation, CC-BY 3.0) over and over, with
another sign drawn on it every second. The clock of the stream is that of its frames, so two hours take minutes.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_longctx.evals import clip, results
from hf_longctx.evals.stream import Row, measure, plot, tenths
from hf_longctx.evals.stream_variants import VARIANTS, Sizes
from hf_longctx.streaming.source import frames
from hf_longctx.testing.vision import tiny_qwen2_5_vl

SIZES = Sizes(window_s=16.0, text_sink=128, text_window=128, max_new_tokens=4)
MAX_PIXELS = 6400
WARM_UP = 120  # rounds: pictures fill their window in 16, text in some dozens
POINTS = 240  # of the curves that are kept


def watch(seconds: int) -> list[Row]:
    """Every round."""
    model, processor = tiny_qwen2_5_vl()
    source = frames(clip.looped(clip.fetch(), seconds, 2.0, MAX_PIXELS), fps=2.0)
    rows: list[Row] = []
    for row in measure("window", VARIANTS["window"](model, processor, SIZES), source):
        rows.append(row)
        if len(rows) % 600 == 0:
            print(f"{len(rows):,} rounds, {row.bytes_held:,} bytes, {1000 * row.cpu_s:.0f} ms of CPU", flush=True)
    return rows


def judge(rows: list[Row]) -> list[dict[str, Any]]:
    """What has to hold of them."""
    settled = rows[WARM_UP:]
    held = sorted({row.bytes_held for row in settled})
    found = [
        {
            "case": "bytes of keys and values held after warm-up",
            "value": held[-1],
            "unit": "bytes",
            "baseline": "least bytes held after warm-up",
            "baseline_value": held[0],
            "ratio": held[-1] / held[0],
            "floor_value": None,
            "must": "constant",
            "met": len(held) == 1,
        }
    ]
    for name, clock in (
        ("cpu_s", "CPU time of a round"),
        ("latency_s", "time of a round by the clock, shared machine"),
    ):
        first, last = tenths([getattr(row, name) for row in settled])
        found.append(
            {
                "case": f"{clock}, median of the last tenth",
                "value": 1000 * last,
                "unit": "ms",
                "baseline": "median of the first tenth after warm-up",
                "baseline_value": 1000 * first,
                "ratio": last / first,
                "floor_value": None,
                "must": "within 5 % of the first" if name == "cpu_s" else None,
                "met": abs(last / first - 1) <= 0.05 if name == "cpu_s" else None,
            }
        )
    shapes = {"rounds": len(rows), "warm_up_rounds": WARM_UP, "stream_s": rows[-1].t_end}
    shapes |= {"frames": sum(row.frames for row in rows), "tokens_held": rows[-1].tokens_held, **asdict(SIZES)}
    return [{**row, "shapes": shapes} for row in found]


def main() -> None:
    """Run, judge, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; a PNG of the same name goes beside it")
    parser.add_argument("--seconds", type=int, default=7200, help="of stream")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = watch(chosen.seconds)
    size = max(1, len(rows) // POINTS)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    curves = {
        "t": [part[-1].t_end for part in parts],
        "bytes_held": [part[-1].bytes_held for part in parts],
        "tokens_held": [part[-1].tokens_held for part in parts],
        "cpu_ms": [round(1000 * statistics.median(row.cpu_s for row in part), 3) for part in parts],
        "latency_ms": [round(1000 * statistics.median(row.latency_s for row in part), 3) for part in parts],
    }
    settings = {
        "model": "tiny random Qwen2.5-VL",
        "footage": clip.BUNNY.credit.splitlines()[0],
        "seconds": chosen.seconds,
    }
    about = results.meta(torch.device("cpu"), settings)
    found = judge(rows)
    results.save_json(chosen.out, {"meta": about, "rows": found, "curves": curves})
    plot(rows, chosen.out.with_suffix(".png"), f"{len(rows):,} rounds of a tiny Qwen2.5-VL on one core, window of 16 s")
    for row in found:
        print(f"{row['case']}: {row['value']:,.1f} {row['unit']}, {row['ratio']:.3f} of the first; met: {row['met']}")


if __name__ == "__main__":
    main()
