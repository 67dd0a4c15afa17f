"""QoQ end to end on a model of Llama 3 8B's shape with random weights: time of a token, and tokens a second, as JSON.

python benchmarks/qoq_generate.py decode throughput --out benchmarks/results/qoq-generate-h200.json
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from decode_generate import filled, milliseconds, model_8b
from qoq import meta, random_weight
from torch import nn

import hf_longctx as lc
from hf_longctx.weights.qoq.config import QoQConfig
from hf_longctx.weights.qoq.linear import QoQLinear, parts_of
from hf_longctx.weights.qoq.quantizer import chosen_linears, declare

CONTEXT, PROMPT = 4096, 1024
LIMIT = 48 * 10**9
"""Bytes of the GPU that throughput may use."""
SPARE = 3 * 10**9
"""Bytes beside weights, keys and values: what a layer computes for the tokens that one call reads, and logits."""


def quantized(model: Any) -> Any:
    """Any 4-bit weights in place of the linears of the decoder, with groups of 128; keys and values of 4 bits."""
    config = QoQConfig(kv_bits=4)
    for name in chosen_linears(model, config):
        old: Any = model.get_submodule(name)
        made = QoQLinear(old.in_features, old.out_features, False, config, "meta")
        for part, x in parts_of(random_weight(old.out_features, old.in_features, 4, 128)).items():
            setattr(made, part, nn.Parameter(x, requires_grad=False))
        model.set_submodule(name, made)
    declare(model, config)
    return model


def decode(model: Any) -> tuple[float, lc.Report]:
    """Milliseconds of a token after `CONTEXT` others."""
    lc.patch(model, lc.Dense())
    value = milliseconds(model, filled(model, CONTEXT))
    return value, lc.report(model)


def rows_within(model: Any, bytes_each: float, new: int) -> int:
    """The largest batch of which keys and values fit beside the weights."""
    weights = sum(x.nbytes for x in model.parameters())
    return int((LIMIT - SPARE - weights) / (bytes_each * (PROMPT + new))) // 8 * 8


def throughput(model: Any, rows: int, new: int) -> dict[str, Any]:
    """New tokens a second of a batch, its prompt included; and what that took."""
    ids = torch.randint(0, 128256, (rows, PROMPT), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    graphs = warmed(model, ids[:8])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    out = model.generate(ids, max_new_tokens=new, min_new_tokens=new, **settings)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    assert out.shape[1] == PROMPT + new
    report = lc.report(model)
    return {
        "tokens_per_s": rows * new / seconds,
        "rows": rows,
        "seconds": round(seconds, 2),
        "peak_bytes": torch.cuda.max_memory_reserved(),
        "kv_bytes": report.kv_bytes,
        "graphs": graphs,
        "eager": report.eager,
    }


def warmed(model: Any, ids: torch.Tensor) -> int:
    """How many graphs there are after some tokens, for which all that is made once was made."""
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    held = model.generate(ids, max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True, **settings)
    return lc.report(model).graphs if held.sequences.shape[1] == ids.shape[1] + 4 else 0


def largest(model: Any, bytes_each: float, new: int, most: int) -> dict[str, Any]:
    """Throughput of the largest batch within `LIMIT`, which the allocator holds to, of at most so many rows."""
    rows = min(rows_within(model, bytes_each, new), most)
    while True:
        gc.collect()
        torch.cuda.empty_cache()
        try:
            return throughput(model, rows, new)
        except torch.OutOfMemoryError:
            rows -= 8


def row(case: str, value: float, unit: str, base: float, ratio: float, must: str, met: bool, **more: Any) -> Any:
    """A row of the file."""
    found = {"case": case, "value": round(value, 3), "unit": unit, "baseline": "bf16 weights, keys and values"}
    found |= {"baseline_value": round(base, 3), "ratio": round(ratio, 3), "floor_value": None, "must": must, "met": met}
    return found | more


@torch.no_grad()
def rows(parts: list[str], new: int, most: int) -> Iterator[dict[str, Any]]:
    """Of the dense model first, then of what becomes of it."""
    model, heads = model_8b(), 32 * 8 * 2
    held = torch.cuda.get_device_properties(0).total_memory
    dense: dict[str, Any] = {}
    if "decode" in parts:
        dense["decode"] = decode(model)[0]
    if "throughput" in parts:
        torch.cuda.set_per_process_memory_fraction(LIMIT / held)
        lc.patch(model, lc.Dense())
        dense["throughput"] = largest(model, heads * 256, new, most)
    quantized(lc.unpatch(model))
    gc.collect()
    torch.cuda.empty_cache()
    if "decode" in parts:
        value, report = decode(model)
        base, name = dense["decode"], f"decode, 8B, QoQ g128 and KV4, {CONTEXT // 1024}K, B=1"
        more = {"shapes": {"rows": 1, "tokens": CONTEXT}, "graphs": report.graphs, "eager": report.eager}
        yield row(name, value, "ms/token", base, base / value, "<= 3 ms/token", value <= 3, **more)
    if "throughput" in parts:
        lc.patch(model, lc.Dense())
        found, base = largest(model, heads * (64 + 4), new, most), dense["throughput"]
        value = found.pop("tokens_per_s")
        before = base.pop("tokens_per_s")
        name = f"generate(), 8B, QoQ g128 and KV4, {PROMPT} + {new} tokens, largest batch within {LIMIT // 10**9} GB"
        more = {"shapes": {"tokens": PROMPT, "new": new}, "quantized": found, "dense": base}
        yield row(name, value, "tokens/s", before, value / before, ">= 2x", value >= 2 * before, **more)


def main() -> None:
    """Run the parts that are named; write what they found, also of those before one that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["decode", "throughput"])
    parser.add_argument("--new", type=int, default=512, help="tokens that each row of throughput makes")
    parser.add_argument("--rows", type=int, default=1 << 20, help="most rows of a batch")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    try:
        for each in rows(arguments.parts, arguments.new, arguments.rows):
            print(json.dumps(each), flush=True)
            found.append(each)
    finally:
        arguments.out.write_text(json.dumps({"meta": meta(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
