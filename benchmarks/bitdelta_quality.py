"""A fine-tune of SmolLM2 on a local text, and its delta: perplexity of both on held-out text, and bytes, as JSON.

python benchmarks/bitdelta_quality.py --out benchmarks/results/bitdelta-smollm2.json
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

import hf_longctx as lc
from hf_longctx.evals import assets, book, results, text

BLOCK = 512
"""Tokens of a piece that is trained on, or held out: every tenth."""

VARIANTS = {"1 bit": {}, "1 bit, a scale per row": {"scales": "row"}, "2 bits": {"bits": 2}}


def blocks_of(tokenizer: Any, name: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces of a text, `[n, BLOCK]`: those to train on, and those that are held out."""
    ids = torch.tensor(text.token_ids(tokenizer, text.read(name)))
    blocks = ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)
    held = torch.arange(len(blocks)) % 10 == 9
    return blocks[~held], blocks[held]


def fine_tune(model: Any, blocks: torch.Tensor, chosen: argparse.Namespace) -> None:
    """All weights, float32 (products in TF32), AdamW."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=chosen.rate, weight_decay=0.0)
    falling = get_cosine_schedule_with_warmup(optimizer, chosen.steps // 20, chosen.steps)
    made = torch.Generator().manual_seed(0)
    for step in range(chosen.steps):
        batch = blocks[torch.randint(len(blocks), (chosen.rows,), generator=made)].to(model.device)
        optimizer.zero_grad()
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        falling.step()
        if step % 50 == 0:
            print(f"fine-tune, step {step}: loss {float(loss.detach()):.3f}", flush=True)
    model.eval().requires_grad_(False)
    torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def nll(model: Any, blocks: torch.Tensor, rows: int) -> float:
    """Mean negative log-likelihood of a token."""
    total = 0.0
    for some in blocks.split(rows):
        batch = some.to(model.device)
        total += float(model(batch, labels=batch, use_cache=False).loss) * len(some)
    return total / len(blocks)


def row(case: str, value: float, base: float, tuned: float, must: float | None = None, **more: Any) -> dict[str, Any]:
    """A line on perplexity; `ratio` is the share of the fine-tune's gain, in log-likelihood, that there is."""
    share = (base - value) / (base - tuned)
    return {
        "case": f"perplexity, {case}",
        "value": round(math.exp(value), 4),
        "unit": "perplexity",
        "baseline": "fine-tune",
        "baseline_value": round(math.exp(tuned), 4),
        "ratio": round(share, 4),
        "floor_value": round(math.exp(tuned), 4),
        "must": None if must is None else f">= {must:.0%} of the gain",
        "met": None if must is None else share >= must,
        **more,
    }


def bytes_row(case: str, sizes: lc.deltas.Sizes) -> dict[str, Any]:
    """A line on bytes, both sides counted at 16 bits."""
    return {
        "case": f"bytes, {case}",
        "value": sizes.nbytes,
        "unit": "bytes",
        "baseline": "fine-tune, 16 bits",
        "baseline_value": 2 * sizes.weights,
        "ratio": round(sizes.ratio, 2),
        "floor_value": sizes.parts.get("signs", 0),
        "must": None,
        "met": None,
        "parts": sizes.parts,
    }


def measure(chosen: argparse.Namespace, root: Path) -> Iterator[tuple[dict[str, Any], torch.device]]:
    """Fine-tune, compress, distil; each model on the held-out pieces. A row as soon as it is known, and where."""
    base_folder = str(assets.fetch() if chosen.model is None else chosen.model)
    model, tokenizer = assets.load(base_folder, "float32", chosen.device)
    place, began = model.device, time.monotonic()
    taught, held = blocks_of(tokenizer, chosen.text)
    held = held[: chosen.held_out]
    base = nll(model, held, chosen.rows)
    fine_tune(model, taught, chosen)
    tuned = nll(model, held, chosen.rows)
    model.save_pretrained(root / "tuned")
    tokenizer.save_pretrained(root / "tuned")
    del model
    print(
        f"fine-tuned after {time.monotonic() - began:.0f} s: {math.exp(base):.3f} to {math.exp(tuned):.3f}", flush=True
    )
    lessons_text = root / "taught.txt"  # the scales, too, are taught nothing that is held out
    lessons_text.write_text(tokenizer.decode(taught.flatten()), encoding="utf-8")
    yield row("base", base, base, tuned), place
    yield row("fine-tune", tuned, base, tuned), place
    for name, settings in list(VARIANTS.items())[: chosen.variants]:
        folder = root / name.replace(",", "").replace(" ", "-")
        sizes = lc.deltas.compress(base_folder, root / "tuned", folder, **settings)
        value = nll(load(folder, place), held, chosen.rows)
        yield row(f"delta-initial, {name}", value, base, tuned), place
        yield bytes_row(f"delta, {name}", sizes), place
        if chosen.distil == "all" or (chosen.distil == "one" and name == "1 bit"):
            lessons = lc.deltas.Lessons(chosen.lessons)
            began = time.monotonic()
            losses = lc.deltas.distil(folder, root / "tuned", lessons_text, lessons, str(place), "float32")
            seconds = {"seconds": round(time.monotonic() - began, 1), "loss": [losses[0], losses[-1]]}
            value = nll(load(folder, place), held, chosen.rows)
            must = 0.9 if name == "1 bit" else None
            yield row(f"delta-distilled, {name}", value, base, tuned, must, **seconds), place


def load(folder: Path, place: torch.device) -> Any:
    """A delta as a model."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(place).eval()


def main() -> None:
    """One text, one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of the base; left out: SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, help="UTF-8; left out: the King James Bible, fetched once")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--rate", type=float, default=5e-5)
    parser.add_argument("--held-out", type=int, default=80, help="pieces that are read at most")
    parser.add_argument("--lessons", type=int, default=200, help="steps of distillation")
    parser.add_argument("--distil", choices=["none", "one", "all"], default="all", help="which deltas")
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="how many, of: " + "; ".join(VARIANTS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args()
    chosen.text = chosen.text or book.fetch(on_step=print)
    settings = {name: x for name, x in vars(chosen).items() if name not in ("out", "text", "model")}
    settings |= {"model": assets.display_name(chosen.model), **text.about(chosen.text, text.read(chosen.text))}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for found, place in measure(chosen, Path(folder)):
            rows.append(found)
            print({name: found[name] for name in ("case", "value", "ratio", "met")}, flush=True)
            results.save_json(chosen.out, {"meta": results.meta(place, {**settings, "block": BLOCK}), "rows": rows})


if __name__ == "__main__":
    main()
