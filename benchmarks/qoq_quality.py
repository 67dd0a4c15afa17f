"""Perplexity and pass keys of a model under QoQ, step by step, on text that it was not calibrated on, as JSON.

python benchmarks/qoq_quality.py --out benchmarks/results/qoq-quality-smollm2.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import hf_longctx as lc
from hf_longctx.evals import assets, passkey, results, text
from hf_longctx.evals.ppl import token_nll
from hf_longctx.evals.respond import respond
from hf_longctx.quantize import run as room
from hf_longctx.weights.qoq.calibrate.blocks import block_of, layers_of
from hf_longctx.weights.qoq.calibrate.flow import calls, embed, watching
from hf_longctx.weights.qoq.calibrate.recipe import Recipe
from hf_longctx.weights.qoq.calibrate.transforms import smooth_attention

STEPS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("rotation", {"rotate": True}),
    ("SmoothAttention", {"smooth_attention": 0.5}),
    ("output smoothing", {"smooth_inputs": 0.3}),
    ("channel order", {"reorder": True}),
    ("clip search", {"clip": True}),
    ("GPTQ", {"gptq": True}),
)
NOTHING = {
    "rotate": False,
    "smooth_attention": 0.0,
    "smooth_inputs": None,
    "reorder": False,
    "clip": False,
    "gptq": False,
}


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor, chunk: int, kv: Any) -> float:
    """Of texts `[S, T]`, each by itself."""
    with lc.patched(model, "dense", kv=kv, cuda_graph=False):
        found = [torch.cat(list(token_nll(model, each, chunk))) for each in ids]
    return math.exp(torch.cat(found).double().mean().item())


def keys_found(model: Any, tokenizer: Any, length: int, trials: int, kv: Any) -> int:
    """Of prompts of `length` tokens, each with a pass key at a depth of its own."""
    asked = list(passkey.exam(tokenizer, "passkey", [length], None, trials, None, 8, 0).trials)
    with lc.patched(model, "dense", kv=kv, cuda_graph=False):
        answers = respond(model, tokenizer, torch.stack([trial.ids for trial in asked]), 8, length)
    return sum(passkey.judge(answer.text, *trial.expected) for answer, trial in zip(answers, asked, strict=True))


@torch.no_grad()
def smooth_keys(model: Any, ids: torch.Tensor, batch: int) -> None:
    """SmoothAttention alone, on weights in floating point."""
    prefix, layers = layers_of(model)
    arguments, hidden = calls(model, layers, ids[:1]), embed(model, layers, ids, batch)
    for index, layer in enumerate(layers):
        layer.float()
        block = block_of(layer, f"{prefix}.{index}", model.config)
        with watching(block, block.head_dim) as (_, keys):
            after = [arguments[index](layer, x.to(model.device)).cpu() for x in hidden]
        smooth_attention(block, keys.size, 0.5)
        layer.to(model.dtype)
        hidden = after


class Ladder:
    """All cases; each starts from the checkpoint."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        model, self.tokenizer = self.load()
        ids = text.stream_ids(self.tokenizer, text.read(chosen.text))
        held = chosen.windows * chosen.window
        self.held = ids[-held:].view(chosen.windows, chosen.window)
        self.calib = ids[: len(ids) - held][: chosen.samples * chosen.seqlen].view(chosen.samples, chosen.seqlen)
        self.device = assets.pick_device(chosen.device)
        self.rows: list[dict[str, Any]] = self.former()
        self.dense = self.known("as it is") or 0.0
        self.dense = self.dense or self.add("as it is", model.to(self.device), "native")

    def settings(self) -> dict[str, Any]:
        """What all rows share."""
        found = {name: str(x) if isinstance(x, Path) else x for name, x in vars(self.chosen).items()}
        own = {name: x for name, x in found.items() if name not in ("out", "cases", "resume")}
        return {**own, "model": assets.display_name(self.chosen.model)}

    def former(self) -> list[dict[str, Any]]:
        """Rows of a run that was cut off."""
        if not (self.chosen.resume and self.chosen.out.exists()):
            return []
        told = json.loads(self.chosen.out.read_text())
        if told["meta"]["settings"] != self.settings():
            raise SystemExit(f"--resume: {self.chosen.out} was made with other settings: {told['meta']['settings']}")
        return list(told["rows"])

    def known(self, case: str) -> float | None:
        """The value of a case that is done."""
        return next((row["value"] for row in self.rows if row["case"] == case), None)

    def load(self) -> tuple[Any, Any]:
        return assets.load(self.chosen.model, self.chosen.dtype, "cpu")

    def add(
        self, case: str, model: Any, kv: Any, seconds: float = 0.0, least: float | None = None, must: Any = None
    ) -> float:
        """Measure a case and write the file again; `least` is the perplexity of weights to the nearest."""
        value = perplexity(model.to(self.device), self.held, self.chosen.chunk, kv)
        base = self.dense or value
        row: dict[str, Any] = {
            "case": case,
            "value": value,
            "unit": "perplexity",
            "baseline": "as it is",
            "baseline_value": base,
        }
        row.update(
            ratio=value / base, kv=kv if isinstance(kv, str) else kv.describe(), quantize_seconds=round(seconds, 1)
        )
        if self.chosen.trials:
            row["passkeys"] = {
                str(length): keys_found(model, self.tokenizer, length, self.chosen.trials, kv)
                for length in self.chosen.lengths
            }
        if least is not None:
            row["share_of_gap_closed"] = (least - value) / (least - base)
        if must is not None:
            row.update(zip(("of", "must", "met"), must(row), strict=True))
        self.rows.append(row)
        print(f"{case:48} {value:9.3f} {value / base:7.4f} {seconds:6.1f} s {row.get('passkeys', '')}", flush=True)
        results.save_json(self.chosen.out, {"meta": results.meta(self.device, self.settings()), "rows": self.rows})
        return value

    def quantized(self, case: str, recipe: Recipe | None, config: lc.QoQConfig, **judge: Any) -> float:
        """Measure weights of a recipe, None: to the nearest; with keys and values of 4 bits."""
        done = self.known(case)
        if done is not None:
            return done
        model = self.load()[0].to(self.device)
        begin = time.perf_counter()
        if recipe is None:
            room.round_all(model, config)
        else:
            task = room.Task(*self.calib.shape, self.chosen.batch, "", "")
            with TemporaryDirectory() as folder:
                room.run(model, self.calib, recipe, task, Path(folder), self.device, False, None)
        return self.add(case, model, "int4", time.perf_counter() - begin, **judge)

    def keys(self) -> None:
        """Keys and values of 4 bits alone."""
        model, _ = self.load()
        self.add("KV4 alone", model.to(self.device), "int4")
        smooth_keys(model, self.calib, self.chosen.batch)
        self.add("KV4 alone, SmoothAttention", model, "int4")
        recent = lc.Int4KV(recent=self.chosen.recent)
        case = f"KV4 alone, SmoothAttention, the last {recent.recent} tokens as they are"
        self.add(case, model, recent, must=lambda row: ("ratio", 1.01, row["ratio"] <= 1.01))

    def climb(self, name: str, config: lc.QoQConfig, whole: bool) -> None:
        """To the nearest, then one step after the other (`whole`), or all at once."""
        least = self.quantized(f"{name}: nearest", None, config)
        recipe = Recipe(config, **NOTHING)
        for number, (step, change) in enumerate(STEPS):
            recipe = replace(recipe, **change)
            last = number == len(STEPS) - 1
            if (step == "channel order" and config.group_size == -1) or not (whole or last):
                continue
            grouped = last and config.group_size != -1
            must = (lambda row: ("share_of_gap_closed", 0.6, row["share_of_gap_closed"] >= 0.6)) if grouped else None
            self.quantized(f"{name}: + {step}" if whole else f"{name}: QoQ", recipe, config, least=least, must=must)


def main() -> None:
    """All of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", help="a hub id or folder; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--text", type=Path, help="a text that ships with the package if not given")
    parser.add_argument("--group-size", type=int, default=64, help="128 does not divide the 576 channels of SmolLM2")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--recent", type=int, default=64, help="tokens that KV4 holds as they are, in one row")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096], help="tokens of prompts with pass keys")
    parser.add_argument("--trials", type=int, default=20, help="prompts of each length; 0: no pass keys")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has")
    parser.add_argument("--cases", default="keys,w8,group,channel", help="group-steps, channel-steps: one by one")
    chosen = parser.parse_args()
    cases, ladder = chosen.cases.split(","), Ladder(chosen)
    if "keys" in cases and ladder.known("KV4 alone, SmoothAttention") is None:
        ladder.keys()
    if "w8" in cases:
        ladder.quantized("W8A8: nearest", None, lc.QoQConfig(8))
    for name, config in (
        ("group", lc.QoQConfig(group_size=chosen.group_size)),
        ("channel", lc.QoQConfig(group_size=-1)),
    ):
        if name in cases or f"{name}-steps" in cases:
            ladder.climb(f"W4A8KV4 {name}", config, f"{name}-steps" in cases)


if __name__ == "__main__":
    main()
