"""Gates of DuoAttention, trained and tried, as JSON.

Seconds a step, how gates lie, whom they agree with, and pass keys found where half of the heads stream, beside random
halves of the same size.

python benchmarks/gates.py --folder pattern/ --out benchmarks/results/gates-smollm2.json
python benchmarks/gates.py --random benchmarks/configs/llama-3.1-8b.json --steps 16 --shortest 3000 --longest 32000 \
    --keys 10 --folder pattern-8b/ --out benchmarks/results/gates-8b.json

With random weights there is nothing to find: seconds a step and memory are all that is written then.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console

from hf_longctx.configs import build
from hf_longctx.evals import assets, grammar, passkey, results, text
from hf_longctx.evals.runner import Options
from hf_longctx.files import read_json
from hf_longctx.heads import HeadPattern, save_pattern, show, train
from hf_longctx.heads.compare import overlap, spearman
from hf_longctx.heads.convert import to_pattern
from hf_longctx.heads.lessons import Lessons, Task
from hf_longctx.heads.scores import HeadScores

SCORES = Path("benchmarks/results/retrieval-heads-smollm2-h200.json")
SHUFFLES = 2


def row(case: str, value: float, unit: str, **more: Any) -> dict[str, Any]:
    """A line of the result; `must` is the bound that `ratio`, or `value` where there is none, is held against."""
    baseline = more.pop("baseline_value", None)
    ratio = value / baseline if baseline else None
    return {"case": case, "value": value, "unit": unit, "baseline_value": baseline, "ratio": ratio, **more}


def trained(chosen: argparse.Namespace, model: Any, tokenizer: Any) -> tuple[HeadPattern, list[dict[str, Any]]]:
    """The pattern, and rows on time and on how gates lie."""
    task = Task(shortest=chosen.shortest, longest=chosen.longest, keys=chosen.keys)
    settings = train.Settings(chosen.steps, chosen.rate, weight=chosen.weight, recompute=False)
    began = time.perf_counter()
    pattern = train.run(model, Lessons(tokenizer, text.shipped(), task), settings, chosen.folder, console=Console())
    seconds = time.perf_counter() - began
    gates = torch.tensor([gate for each in pattern.gates for gate in each])
    counts = torch.histc(gates, 10, 0, 1).int().tolist()
    ends = (counts[0] + counts[-1]) / len(gates)
    minutes = {"must": "<= 240 s of 2,000 steps", "met": seconds / chosen.steps * 2000 <= 240}
    return pattern, [
        row("training", seconds, "s", steps=chosen.steps, **minutes),
        row("step", 1000 * seconds / chosen.steps, "ms", shape=[chosen.shortest, chosen.longest]),
        row("gates below 0.1 or above 0.9", ends, "share", histogram=counts, must=">= 0.5", met=ends >= 0.5),
    ]


def of_any_weights(chosen: argparse.Namespace) -> None:
    """Train gates of random weights of a shape, and write seconds and memory."""
    model = build(chosen.random, chosen.dtype, assets.pick_device(chosen.device), 0)
    _, tokenizer = assets.load(None, "float32", "cpu")
    task = Task(shortest=chosen.shortest, longest=chosen.longest, keys=chosen.keys)
    began = time.perf_counter()
    lessons = Lessons(tokenizer, text.shipped(), task)
    train.run(model, lessons, train.Settings(chosen.steps), chosen.folder, console=Console())
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**30 if model.device.type == "cuda" else math.nan
    rows = [
        row("training with random weights", seconds / chosen.steps, "s/step", steps=chosen.steps),
        row("peak memory of it", peak, "GiB"),
    ]
    settings = {"config": str(chosen.random), "dtype": chosen.dtype, "tokens": [chosen.shortest, chosen.longest]}
    results.save_json(chosen.out, {"meta": results.meta(model.device, settings), "rows": rows})
    print(rows)


def agreement(pattern: HeadPattern, path: Path) -> list[dict[str, Any]]:
    """Rows on the detector of retrieval heads, whose scores become gates of KV heads."""
    heads = read_json(str(path), "scores", "Pass --scores")["heads"]
    means = {tuple(map(int, name.split("-"))): (float(score),) for name, score in heads.items()}
    detected = to_pattern(HeadScores(means, path.stem), len(pattern.gates[0]))
    ours, theirs = show.values(pattern), show.values(detected)
    top = min(20, len(ours))
    return [
        row("rank correlation with the detector", spearman(ours, theirs), "Spearman", heads=len(ours)),
        row(f"top {top} in common with the detector's", overlap(ours, theirs, top), "share", heads=len(ours)),
    ]


def shuffled(pattern: HeadPattern, seed: int) -> HeadPattern:
    """The same gates on other heads."""
    flat = [gate for each in pattern.gates for gate in each]
    random.Random(seed).shuffle(flat)
    width = len(pattern.gates[0])
    return replace(pattern, gates=tuple(tuple(flat[i : i + width]) for i in range(0, len(flat), width)))


def keys_found(chosen: argparse.Namespace, model: Any, tokenizer: Any, pattern: HeadPattern) -> list[dict[str, Any]]:
    """Rows on pass keys: dense, the gates, and the same gates on other heads."""
    folders = [chosen.folder] + [chosen.folder.with_name(f"{chosen.folder.name}-{seed}") for seed in range(SHUFFLES)]
    for seed, folder in enumerate(folders[1:]):
        save_pattern(shuffled(pattern, seed), folder, {})
    wanted = ",".join(f"duo_attention(pattern={folder},sparsity=0.5)" for folder in folders)
    options = Options(batch=chosen.batch, out=chosen.folder.with_name(f"{chosen.folder.name}-keys"))
    sizes = grammar.lengths(chosen.lengths)
    found = passkey.run(model, tokenizer, wanted, sizes, chosen.trials, options=options, console=Console())
    names = ["dense", "gates", *(f"shuffle {seed}" for seed in range(SHUFFLES))]
    shares = {}
    for name, method in zip(names, dict.fromkeys(each.method for each in found), strict=True):
        mine = [each for each in found if each.method == method]
        shares[name] = (
            fmean(each.score for each in mine),
            {n: sum(e.score for e in mine if e.length == n) for n in sizes},
        )
    dense, trials = shares["dense"][0], chosen.trials * len(sizes)
    lines = []
    for name, (share, by_length) in shares.items():
        bound, met = {"dense": (None, None), "gates": (">= dense - 0.1", share >= dense - 0.1)}.get(
            name, ("<= half of the gates'", share <= shares["gates"][0] / 2)
        )
        about = {"trials": trials, "found": by_length, "must": bound, "met": met}
        lines.append(row(f"pass keys, {name}", share, "share", baseline="dense", baseline_value=dense, **about))
    return lines


def main() -> None:
    """Train, look, try."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="of the pattern; others are made beside it")
    parser.add_argument("--model", help="a hub id or folder; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--random", type=Path, help="a config.json: random weights of that shape, time and memory only")
    parser.add_argument("--scores", type=Path, default=SCORES, help="of the detector")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--weight", type=float, default=0.05)
    parser.add_argument("--shortest", type=int, default=1024)
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--keys", type=int, default=4)
    parser.add_argument("--lengths", default="2k,3k,4k", help="of prompts: far longer than what streaming heads see")
    parser.add_argument("--trials", type=int, default=10, help="for each length")
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    chosen = parser.parse_args()
    if chosen.random is not None:
        return of_any_weights(chosen)
    model, tokenizer = assets.load(chosen.model, chosen.dtype, chosen.device)
    pattern, rows = trained(chosen, model, tokenizer)
    names = ("steps", "rate", "weight", "shortest", "longest", "keys", "lengths", "trials", "dtype")
    settings = {name: getattr(chosen, name) for name in names} | {"model": assets.display_name(chosen.model)}
    content = {"meta": results.meta(model.device, settings), "rows": rows, "gates": pattern.gates}
    rows += agreement(pattern, chosen.scores)
    results.save_json(chosen.out, content)
    rows += keys_found(chosen, model, tokenizer, pattern)
    results.save_json(chosen.out, content)
    for each in rows:
        print({key: value for key, value in each.items() if value is not None})


if __name__ == "__main__":
    main()
