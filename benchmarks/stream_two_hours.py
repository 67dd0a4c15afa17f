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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_longctx.evals import clip, results
from hf_longctx.evals.stream import Row, measure, tenths
from hf_longctx.evals.stream_variants import VARIANTS, Sizes
from hf_longctx.streaming.source import frames
from hf_longctx.testing.vision import tiny_qwen2_5_vl

SIZES = Sizes(window_s=16.0, text_sink=128, text_window=128, max_new_tokens=4)
MAX_PIXELS = 6400
WARM_UP_S = 1020  # windows are full long before; from 1,000 s on the times in the prompt have four digits, to the end
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


def curves(rows: list[Row]) -> dict[str, list[float]]:
    """Stretches of the stream: what is held at the end of each, most of it at any time, and what its rounds take."""
    size = max(1, len(rows) // POINTS)
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    return {
        "t": [part[-1].t_end for part in parts],
        "bytes_held": [part[-1].bytes_held for part in parts],
        "tokens_held": [part[-1].tokens_held for part in parts],
        "cpu_ms": [round(1000 * statistics.median(row.cpu_s for row in part), 3) for part in parts],
        "latency_ms": [round(1000 * statistics.median(row.latency_s for row in part), 3) for part in parts],
    }


def judge(drawn: dict[str, list[float]]) -> list[dict[str, Any]]:
    """What has to hold of the curves."""
    settled = [n for n, t in enumerate(drawn["t"]) if t >= min(WARM_UP_S, drawn["t"][-1] / 5)]
    held = sorted({drawn["bytes_held"][n] for n in settled})
    shapes = {"stream_s": drawn["t"][-1], "rounds": round(drawn["t"][-1]), "frames": round(2 * drawn["t"][-1])}
    shapes |= {"tokens_held": drawn["tokens_held"][-1], "warm_up_s": WARM_UP_S, **asdict(SIZES)}

    def row(case: str, value: float, unit: str, baseline: str, before: float, must: str, met: bool) -> dict[str, Any]:
        facts = {"case": case, "value": value, "unit": unit, "baseline": baseline, "baseline_value": before}
        return {**facts, "ratio": value / before, "floor_value": None, "must": must, "met": met, "shapes": shapes}

    least = "least after warm-up"
    found = [row("bytes held, most after warm-up", held[-1], "bytes", least, held[0], "constant", len(held) == 1)]
    most, fewest = (pick(drawn["tokens_held"][n] for n in settled) for pick in (max, min))
    found.append(row("tokens held, most after warm-up", most, "tokens", least, fewest, "constant", most == fewest))
    for name, clock in (("cpu_ms", "CPU time of a round"), ("latency_ms", "time of a round by the clock")):
        first, last = tenths([drawn[name][n] for n in settled])
        flat = abs(last / first - 1) <= 0.05
        found.append(row(f"{clock}, last tenth", last, "ms", "first tenth after warm-up", first, "within 5 %", flat))
    return found


def draw(drawn: dict[str, list[float]], path: Path) -> None:
    """Time of a round and bytes held over the stream, as a PNG."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(drawn["t"], drawn["latency_ms"], label="by the clock", color="lightgrey")
    above.plot(drawn["t"], drawn["cpu_ms"], label="CPU time")
    above.legend()
    below.plot(drawn["t"], [held / 2**20 for held in drawn["bytes_held"]])
    above.set(
        ylabel="ms a round (medians)", ylim=(0, None), title="Two hours of stream, tiny Qwen2.5-VL, window of 16 s"
    )
    most = max(drawn["bytes_held"]) / 2**20
    below.set(xlabel="seconds of the stream", ylabel="keys and values held, MiB", ylim=(0, 1.2 * most))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run, judge, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file; a PNG of the same name goes beside it")
    parser.add_argument("--seconds", type=int, default=7200, help="of stream")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = watch(chosen.seconds)
    drawn = curves(rows)
    settings = {
        "model": "tiny random Qwen2.5-VL",
        "footage": clip.BUNNY.credit.splitlines()[0],
        "seconds": chosen.seconds,
    }
    about = results.meta(torch.device("cpu"), settings)
    found = judge(drawn)
    results.save_json(chosen.out, {"meta": about, "rows": found, "curves": drawn})
    draw(drawn, chosen.out.with_suffix(".png"))
    for row in found:
        print(f"{row['case']}: {row['value']:,.1f} {row['unit']}, {row['ratio']:.3f} of the first; met: {row['met']}")


if __name__ == "__main__":
    main()
