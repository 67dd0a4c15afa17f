"""Streams under several variants: what a round takes, what is held, and how well captions agree with a reference."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..streaming.source import FrameSource
from ..streaming.subtitles import Cue
from .alignment import Judge, align
from .journal import Journal
from .results import meta, save_json
from .runner import bar, model_name
from .stream_variants import VARIANTS, Runner, Sizes


@dataclass(frozen=True)
class Row:
    """One round under one variant.

    Attributes:
        variant: a name of `VARIANTS`.
        t: seconds of the stream at which the round begins.
        t_end: and ends.
        text: that was said.
        frames: that went in.
        tokens: that came out.
        latency_s: from the frames to the last token.
        cpu_s: seconds of the processor that this thread had from one event to the next; steadier than the clock where
            others use the machine too. Of a GPU's work it knows nothing.
        tokens_held: tokens with keys and values stored after the round.
        bytes_held: their bytes.
    """

    variant: str
    t: float
    t_end: float
    text: str
    frames: int
    tokens: int
    latency_s: float
    cpu_s: float
    tokens_held: int
    bytes_held: int


def measure(variant: str, runner: Runner, source: FrameSource) -> Generator[Row, None, None]:
    """Run a stream, and yield a row after each round; the source is closed at the end."""
    with source, runner:
        began = time.thread_time()
        for event in runner.run(source):
            cpu_s = time.thread_time() - began
            said = (event.t, event.t_end, event.text, event.frames, event.tokens, event.latency_s)
            yield Row(variant, *said, cpu_s, *runner.held())
            began = time.thread_time()


def tenths(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and the last tenth, a value each at least."""
    size = max(1, len(values) // 10)
    return statistics.median(values[:size]), statistics.median(values[-size:])


def summary(rows: Sequence[Row], reference: Sequence[Cue], judge: Judge | None, tolerance_s: float) -> dict[str, Any]:
    """One variant's rows in numbers.

    Args:
        rows: of one variant, in order; rounds in which the window still fills count too, but for `settled`.
        reference: what should have been said; empty leaves out the agreement.
        judge: as `align`.
        tolerance_s: likewise.
    """
    latencies = sorted(row.latency_s for row in rows)
    settled = rows[len(rows) // 5 :]
    first, last = tenths([row.latency_s for row in settled])
    found: dict[str, Any] = {
        "variant": rows[0].variant,
        "rounds": len(rows),
        "stream_s": rows[-1].t_end,
        "latency_p50_ms": 1000 * latencies[len(latencies) // 2],
        "latency_p99_ms": 1000 * latencies[min(len(latencies) - 1, len(latencies) * 99 // 100)],
        "frames_per_s": sum(row.frames for row in rows) / sum(latencies),
        "last_to_first_tenth": last / first,
        "tokens_held": rows[-1].tokens_held,
        "bytes_held": rows[-1].bytes_held,
        "bytes_held_most": max(row.bytes_held for row in rows),
        "bytes_constant": len({row.bytes_held for row in settled}) == 1,
    }
    if reference:
        seen = [cue for cue in reference if cue.start < rows[-1].t_end]
        said = [Cue(row.t, row.t_end, row.text) for row in rows if row.text.strip()]
        found |= asdict(align(seen, said, tolerance_s, judge))
    return found


def run(
    model: Any,
    processor: Any,
    variants: Sequence[str],
    frames: Callable[[], FrameSource],
    sizes: Sizes,
    *,
    reference: Sequence[Cue] = (),
    judge: Judge | None = None,
    tolerance_s: float = 1.0,
    limits_s: dict[str, float] | None = None,
    about: dict[str, Any] | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """The same stream under every variant, one after the other.

    Args:
        model: an unpatched vision-language model.
        processor: its own.
        variants: names of `VARIANTS`.
        frames: opens the stream, once for each.
        sizes: of the window.
        reference: captions that should come out.
        judge: of two texts; asked beside.
        tolerance_s: seconds that a word may be early or late.
        limits_s: seconds of stream after which a variant is stopped: what grows need not run to the end.
        about: more about the stream, for the files.
        out: folder for `stream.jsonl`, `stream_summary.json` and `stream.png`.
        console: where bar and table go.

    Returns:
        A summary for each variant.

    Raises:
        ValueError: a variant that is none, or files that are there; nothing ran.
    """
    check(variants)
    settings = {"model": model_name(model), "dtype": str(model.dtype).removeprefix("torch."), **asdict(sizes)}
    settings |= {"tolerance_s": tolerance_s, "variants": list(variants), **(about or {})}
    journal = None if out is None else Journal(out, "stream", settings, model.device, resume=False)
    rows: list[Row] = []
    found = []
    with bar(console) as shown:
        for name in variants:
            limit = (limits_s or {}).get(name, math.inf)
            mine = _watched(name, VARIANTS[name](model, processor, sizes), frames(), limit, journal, shown)
            rows += mine
            found.append(summary(mine, reference, judge, tolerance_s))
            if out is not None:
                save_json(out / "stream_summary.json", {"meta": meta(model.device, settings), "rows": found})
    if console:
        console.print(table(found))
    if out is not None and find_spec("matplotlib"):
        plot(rows, out / "stream.png", f"{settings['model']}: a stream, round by round")
    return found


def _watched(
    name: str, runner: Runner, source: FrameSource, limit: float, journal: Journal | None, shown: Progress
) -> list[Row]:
    """One variant's rounds until the stream or the limit ends, written as they come."""
    total = None if source.duration is None else int(min(source.duration, limit))
    task = shown.add_task(name, total=total, said="")
    mine = []
    with closing(measure(name, runner, source)) as rows:
        for row in rows:
            mine.append(row)
            if journal:
                journal.append([asdict(row)])
            shown.update(task, completed=row.t_end, said=f"{1000 * row.latency_s:.0f} ms, {row.tokens_held} tokens")
            if row.t_end >= limit:
                break
    return mine


def check(variants: Sequence[str]) -> None:
    """Refuse names that are none, or none at all."""
    for name in variants:
        if name not in VARIANTS:
            raise ValueError(f"variants: expected {', '.join(VARIANTS)}; got '{name}'. Leave it out.")
    if not variants or len(set(variants)) < len(variants):
        raise ValueError(
            f"variants: expected some of {', '.join(VARIANTS)}, each once; got {', '.join(variants) or ''}."
        )


def load_judge(named: str) -> Judge:
    """The function of `package.module:function`; raises ValueError where there is none."""
    module, _, function = named.partition(":")
    try:
        judge: Judge = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--judge: expected package.module:function; got '{named}' ({error}).") from error
    return judge


def table(found: Sequence[dict[str, Any]]) -> Table:
    """A row for each variant."""
    shown = Table(title="One stream under every variant", title_justify="left")
    for name in (
        "variant",
        "stream",
        "p50",
        "p99",
        "frames/s",
        "last : first tenth",
        "tokens",
        "KV held",
        "F1",
        "judge",
    ):
        shown.add_column(name, justify="left" if name == "variant" else "right")
    for row in found:
        f1, judged = row.get("f1"), row.get("judged")
        shown.add_row(
            row["variant"],
            f"{row['stream_s']:g} s",
            f"{row['latency_p50_ms']:.0f} ms",
            f"{row['latency_p99_ms']:.0f} ms",
            f"{row['frames_per_s']:.1f}",
            f"{row['last_to_first_tenth']:.2f}",
            f"{row['tokens_held']:,}",
            f"{row['bytes_held'] / 2**20:,.2f} MiB",
            "" if f1 is None else f"{f1:.3f}",
            "" if judged is None else f"{judged:.3f}",
        )
    return shown


def plot(rows: Sequence[Row], path: Path, title: str, window: int = 0) -> None:
    """Draw what a round takes and what is held over stream time, a line for each variant, as a PNG.

    Args:
        rows: of all variants.
        path: of the PNG.
        title: above the plot.
        window: rounds whose median is drawn as one point; 0 is a hundredth of the longest stream.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    names = list(dict.fromkeys(row.variant for row in rows))
    longest = max(sum(row.variant == name for row in rows) for name in names)
    size = window or max(1, longest // 100)
    for name in names:
        mine = [row for row in rows if row.variant == name]
        parts = [mine[start : start + size] for start in range(0, len(mine), size)]
        t = [part[-1].t_end for part in parts]
        above.plot(t, [1000 * statistics.median(row.latency_s for row in part) for part in parts], label=name)
        below.plot(t, [max(row.bytes_held for row in part) / 2**20 for part in parts], label=name)
    above.set(ylabel="ms a round" + (f" (median of {size})" if size > 1 else ""), ylim=(0, None), title=title)
    most = max(row.bytes_held for row in rows) / 2**20
    below.set(xlabel="seconds of the stream", ylabel="keys and values held, MiB", ylim=(0, 1.2 * most))
    for axes in (above, below):
        axes.grid(alpha=0.3)
    above.legend()
    figure.savefig(path, dpi=120)
