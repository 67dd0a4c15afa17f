"""Endless video on Qwen2.5-VL 7B's shape with random weights: frames a second, and whether that stays so.

Rounds of one second, two frames of 448 x 448 each, 20 new tokens. The frames have the size that the model reads: they
are cut into patches on the CPU, and not resized. Beside it what the paper calls the sliding window with recomputation:
the stock model reads all that the session holds again in every round, its frames included.

python benchmarks/stream.py --rounds 7200 --journal stream.jsonl --state stream.safetensors --seconds 500

Rounds are written to the journal as they come. A run that ends before its last round leaves the session in the state
file, and the same command goes on with it: a session that was saved and loaded is the same stream.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_longctx as lc
from hf_longctx.stream import Frame, Session, load_session, save_session
from hf_longctx.testing.pixels import Pixels

SIZE, FPS, NEW, WARM = 448, 2, 20, 50
EACH = 100  # rounds of a line of the journal
BEGINS = 1000  # seconds of the stream, so that the times in the prompt have four digits for two hours
LAST = 4.27e12  # bytes a second that an H200 reads at best, as measured by the tests of the kernels


def model_7b(processor: Pixels, small: bool) -> Any:
    """Qwen2.5-VL 7B with random weights, on the GPU from the start; `small` for a try on a CPU."""
    ids = processor.tokenizer.convert_tokens_to_ids
    text = {
        "vocab_size": 1024 if small else 152064,
        "hidden_size": 64 if small else 3584,
        "intermediate_size": 96 if small else 18944,
        "num_hidden_layers": 2 if small else 28,
        "num_attention_heads": 4 if small else 28,
        "num_key_value_heads": 2 if small else 4,
        "max_position_embeddings": 32768,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e6,
            "mrope_section": [2, 3, 3] if small else [16, 24, 24],
        },
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    vision = {
        "depth": 1 if small else 32,
        "hidden_size": 32 if small else 1280,
        "num_heads": 2 if small else 16,
        "intermediate_size": 32 if small else 3420,
        "out_hidden_size": text["hidden_size"],
        "fullatt_block_indexes": [0] if small else [7, 15, 23, 31],
        "tokens_per_second": 2,
    }
    marks = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    marks |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=False,
        **{f"{name}_token_id": ids(mark) for name, mark in marks.items()},
    )
    dtype = torch.float32 if small else torch.bfloat16
    torch.manual_seed(0)
    with torch.device("cpu" if small else "cuda"):
        return transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype).eval()


def frames(size: int, number: int = 0) -> Iterator[Frame]:
    """Noise without an end, 16 pictures over and over, from the one of that number on."""
    made = torch.Generator().manual_seed(0)
    pictures = [torch.randint(0, 256, (size, size, 3), dtype=torch.uint8, generator=made) for _ in range(16)]
    while True:
        yield Frame(BEGINS + number / FPS, pictures[number % 16])
        number += 1


@dataclass
class Journal:
    """Rounds after the warm-up, on the disk as they come.

    Attributes:
        path: of the file; None: none is written.
        took_ms: of each round, from end to end.
        held: number of the run from 0 on, bytes and tokens that were seen after a round, each of them once.
        parts: where a run began, by number of rounds before it.
    """

    path: Path | None
    took_ms: list[float] = field(default_factory=list)
    held: list[tuple[int, int, int]] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)

    def read(self) -> None:
        """What runs before have written."""
        if self.path is not None and self.path.exists():
            for line in map(json.loads, self.path.read_text().splitlines()):
                self.took_ms += line["round_ms"]
                self.held += [seen for seen in map(tuple, line["held"]) if seen not in self.held]
                self.parts = line["parts"]

    def write(self, since: int) -> None:
        """Rounds from that number on."""
        if self.path is not None and len(self.took_ms) > since:
            line = {"round_ms": self.took_ms[since:], "held": self.held, "parts": self.parts}
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def stream(session: Session, journal: Journal, rounds: int, seconds: float, size: int, warm: int) -> None:
    """Rounds until there are as many, or so many seconds have gone; those of the warm-up are not noted.

    Args:
        session: a new one, or one that goes on with the rounds of the journal.
        journal: takes the rounds.
        rounds: after the warm-up, those of the journal among them.
        seconds: of this run.
        size: of the pictures.
        warm: rounds of the warm-up.
    """
    engine, written = session.engine, len(journal.took_ms)
    gone = session.stats.rounds
    began = last = time.perf_counter()
    for number, event in enumerate(session.run(frames(size, FPS * gone)), gone):
        now = time.perf_counter()
        if number >= warm:
            assert event.tokens == NEW
            journal.took_ms.append(round(1000 * (now - last), 2))
            seen = len(journal.parts) - 1, engine.cache.kv_bytes, engine.rows[0].tokens
            journal.held += [] if seen in journal.held else [seen]
        if len(journal.took_ms) >= written + EACH:
            journal.write(written)
            written = len(journal.took_ms)
        last = now
        if len(journal.took_ms) >= rounds or now - began > seconds:
            break
    journal.write(written)


def recomputed(session: Session, ids: torch.Tensor, vision: list[Any], times: int) -> list[float]:
    """Seconds of a round in which the stock model reads all that the session holds, and says as much.

    Args:
        session: left already, so that its model is the stock model again.
        ids: `[1, T]`, all that it held.
        vision: what the vision tower reads of each round that it held.
        times: how often.
    """
    model, device = session.model, session.model.device
    kinds = 2 * (ids == model.config.video_token_id)
    took = []
    for _ in range(times):
        torch.cuda.synchronize() if device.type == "cuda" else None
        began = time.perf_counter()
        given = {name: torch.cat([x[name] for x in vision]).to(device) for name in vision[0]}
        given["pixel_values_videos"] = given["pixel_values_videos"].to(model.dtype)
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=torch.ones_like(ids).to(device),
            mm_token_type_ids=kinds.to(device),
            **given,
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
        )
        assert out.shape[1] == ids.shape[1] + NEW
        took.append(time.perf_counter() - began)
    return took


def row(case: str, value: float, unit: str, must: str, met: bool, **more: Any) -> dict[str, Any]:
    """One object of the table."""
    names = ("baseline", "baseline_value", "ratio", "floor_value")
    return {
        "case": case,
        "value": value,
        "unit": unit,
        **{name: more.pop(name, None) for name in names},
        "must": must,
        "met": met,
        **more,
    }


def table(journal: Journal, base: list[float], floor: float) -> list[dict[str, Any]]:
    """The rows of the results."""
    took = [x / 1000 for x in journal.took_ms]
    number, held, tokens = zip(*journal.held, strict=True)
    by_run = [[size for run, size in zip(number, held, strict=True) if run == one] for one in sorted(set(number))]
    most = max(max(sizes) / min(sizes) for sizes in by_run)
    rounds, tenth = len(took), max(1, len(took) // 10)
    rate = FPS * rounds / sum(took)
    drift = statistics.mean(took[-tenth:]) / statistics.mean(took[:tenth])
    again = FPS / statistics.median(base)
    shapes = {"rows": 1, "rounds": rounds, "stream_s": rounds, "tokens_held": max(tokens), "frame": [SIZE, SIZE]}
    ranked = sorted(took)
    return [
        row(
            "stream 7B, 2 fps rounds, 20 tokens a round: sustained frames/s",
            round(rate, 2),
            "frames/s",
            ">= 8 frames/s",
            rate >= 8,
            floor_value=round(FPS / floor, 2),
            shapes=shapes,
            round_p50_ms=round(1000 * ranked[rounds // 2], 2),
            round_p99_ms=round(1000 * ranked[-(-99 * rounds // 100) - 1], 2),
        ),
        row(
            f"stream 7B: time of a round, last tenth against first, over {rounds} s of stream",
            round(drift, 4),
            "ratio",
            "<= 1.05 over at least 7200 s of stream",
            drift <= 1.05 and rounds >= 7200,
            shapes=shapes,
        ),
        row(
            "stream 7B: live bytes of the cache after the warm-up, most against least of a run",
            most,
            "ratio",
            "constant",
            most == 1,
            shapes=shapes,
            bytes=[max(sizes) for sizes in by_run],
        ),
        row(
            "stream 7B: frames/s against the sliding window with recomputation",
            round(rate, 2),
            "frames/s",
            ">= 3x",
            rate >= 3 * again,
            baseline="stock model, sdpa, all that is held read again in each round, pictures included",
            baseline_value=round(again, 2),
            ratio=round(rate / again, 2),
            shapes=shapes,
        ),
    ]


def watched(session: Session, vision: list[Any]) -> None:
    """Note what the vision tower reads of the last 16 rounds."""
    encode = session.engine.chat.encode

    def noted(turns: Any) -> Any:
        out = encode(turns)
        vision[:] = [*vision, out.vision][-16:]
        return out

    session.engine.chat.encode = noted  # type: ignore[method-assign]


def meta(options: argparse.Namespace, journal: Journal, report: lc.Report, base: list[float]) -> dict[str, Any]:
    """On what it ran, and how."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    medians = [
        round(statistics.median(journal.took_ms[first : first + EACH]), 2)
        for first in range(0, len(journal.took_ms), EACH)
    ]
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": options.commit or found.stdout.strip(),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "weights": "random",
        "processor": "frames of the model's size, cut into patches; no resize",
        "floor": "20 times the weights of the text side and the cache, at 4.27 TB/s; neither pictures nor prompt",
        "graphs": report.graphs,
        "eager": report.eager,
        "parts": journal.parts,
        f"round_ms, medians of {EACH}": medians,
        "recomputed_ms": [round(1000 * x, 1) for x in base],
    }


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7200, help="after the warm-up")
    parser.add_argument("--seconds", type=float, default=60.0, help="of rounds in this run, warm-up included")
    parser.add_argument("--journal", type=Path, help="rounds as they come; a run goes on with those that are there")
    parser.add_argument("--state", type=Path, help="the session, to go on from")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stream-h200.json"))
    parser.add_argument("--commit", default="")
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU, to try the script")
    options = parser.parse_args()
    size = 56 if options.small else SIZE
    processor, journal = Pixels(), Journal(options.journal)
    goes_on = options.state is not None and options.state.exists()
    if goes_on:
        journal.read()
    began = time.perf_counter()
    model = model_7b(processor, options.small)
    print(f"model made in {time.perf_counter() - began:.1f} s", flush=True)
    vision: list[Any] = []
    fresh = load_session(model, processor, options.state) if goes_on else Session(model, processor, max_new_tokens=NEW)
    with fresh as session:
        journal.parts.append(len(journal.took_ms))
        watched(session, vision)
        stream(session, journal, options.rounds, options.seconds, size, 5 if options.small else WARM)
        ids = torch.tensor([[token for span in session.engine.rows[0].spans for token in span.ids]])
        report = lc.report(model)
        print(report, flush=True)
        if options.state is not None:
            save_session(session, options.state)
    base = recomputed(session, ids, vision, 4)[1:]
    weights = sum(x.nbytes for x in model.get_decoder().parameters()) + model.lm_head.weight.nbytes
    weights -= model.get_input_embeddings().weight.nbytes
    floor = NEW * (weights + journal.held[-1][1]) / LAST
    rows = table(journal, base, floor)
    for line in rows:
        print(f"{line['case']}: {line['value']} {line['unit']}, must {line['must']}, met {line['met']}", flush=True)
    about = meta(options, journal, report, base)
    options.out.write_text(json.dumps({"meta": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
