"""Quantized experts against bf16 ones: the time of all that a layer's experts do for some tokens, as JSON.

python benchmarks/qoq_experts.py --out benchmarks/results/qoq-experts-h200.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from qoq import DEVICE, DTYPE, FORMS, layers, median_time, meta
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_longctx.kernels import dispatch
from hf_longctx.kernels.experts import PackedExperts, combine_experts, sort_experts, w4a8_experts
from hf_longctx.kernels.linear import quantize_gated, quantize_tokens

MODELS = {"Mixtral 8x7B": (8, 2, 4096, 14336), "Qwen3 30B-A3B": (128, 8, 2048, 768)}
"""Experts, of which each token has so many; channels, and those between the two products."""
MUST = {1: 3.0, 16: 3.0, 64: 3.0, 512: 2.0, 4096: 1.8}


def random_experts(count: int, rows: int, columns: int, bits: int, group: int) -> PackedExperts:
    """Any codes, whose values fit into int8."""
    codes = torch.randint(0, 256, (count, rows, columns * bits // 8), dtype=torch.uint8, device=DEVICE)
    scale, groups = torch.full((count, rows), 1e-3, device=DEVICE), None
    if group:
        shape = (count, rows // 64, columns // group, 64, 2)
        groups = torch.randint(1, 9, shape, dtype=torch.uint8, device=DEVICE)
        groups[..., 1] = 128 - groups[..., 0] * 7
    return PackedExperts(codes, scale, None if group or bits == 8 else 8 * scale, groups, columns)


def size(weight: PackedExperts) -> int:
    """Bytes of one expert's."""
    parts = (weight.codes, weight.scale, weight.shift, weight.groups)
    return sum(x[0].nbytes for x in parts if x is not None)


def routed(tokens: int, experts: int, top: int) -> tuple[Tensor, Tensor]:
    """Experts of each token, no two alike, and their weights."""
    made = torch.Generator(DEVICE).manual_seed(tokens)
    scores, ids = torch.rand(tokens, experts, device=DEVICE, generator=made).topk(top)
    return scores / scores.sum(-1, keepdim=True), ids


def quantized(x: Tensor, ids: Tensor, weights: Tensor, up: PackedExperts, down: PackedExperts) -> Tensor:
    """What the experts make of tokens."""
    by = sort_experts(ids.flatten(), len(up.scale))
    gate, other = w4a8_experts(quantize_tokens(x), up, by, ids.shape[1], DTYPE).chunk(2, 1)
    rows = w4a8_experts(quantize_gated(gate, other), down, by, 0, DTYPE)
    return combine_experts(rows, by, weights)


def dense(shape: tuple[int, int, int, int]) -> list[MixtralExperts]:
    """Enough layers of experts in bf16 to be past the cache, as transformers computes them by torch's grouped_mm."""
    experts, top, width, inner = shape
    config = MixtralConfig(
        hidden_size=width, intermediate_size=inner, num_local_experts=experts, num_experts_per_tok=top
    )
    config._experts_implementation = "grouped_mm"
    made = []
    for _ in range(layers(6 * experts * width * inner)):
        with DEVICE:
            torch.set_default_dtype(DTYPE)
            made.append(MixtralExperts(config).requires_grad_(False))
            torch.set_default_dtype(torch.float32)
        for x in made[-1].parameters():
            x.normal_()
    return made


def rows(name: str, form: str, bandwidth: float) -> Iterator[dict[str, Any]]:
    """A row for each number of tokens."""
    experts, top, width, inner = shape = MODELS[name]
    plain = dense(shape)
    count = layers(3 * experts * width * inner * FORMS[form][0] // 8)
    sizes = ((2 * inner, width), (width, inner))
    weights = [[random_experts(experts, *each, *FORMS[form]) for each in sizes] for _ in range(count)]
    for tokens, must in MUST.items():
        x = torch.randn(tokens, width, device=DEVICE, dtype=DTYPE)
        by, ids = routed(tokens, experts, top)
        base = median_time(lambda x=x, ids=ids, by=by: [layer(x, ids, by) for layer in plain], len(plain))
        value = median_time(lambda x=x, ids=ids, by=by: [quantized(x, ids, by, *each) for each in weights], count)
        touched = ids.unique().numel()
        read = touched * sum(size(each) for each in weights[0])
        floor = max(read / bandwidth, 6 * tokens * top * width * inner / 1.6e15) * 1e6
        yield {
            "case": f"{name} experts, W4A8 {form}, M = {tokens}",
            "value": round(value, 2),
            "unit": "us",
            "baseline": "transformers' experts in bf16, torch grouped_mm",
            "baseline_value": round(base, 2),
            "ratio": round(base / value, 3),
            "floor_value": round(floor, 2),
            "must": f">= {must}x",
            "met": base / value >= must,
            "shapes": {"M": tokens, "experts": experts, "top": top, "width": width, "inner": inner, "read": touched},
            "layers": count,
            "backend": dispatch.last_used()["w4a8_experts"],
        }


@torch.no_grad()
def main() -> None:
    """All models; what was found is written, also before a case that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=list(FORMS), default="g128")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    x = torch.ones(1 << 30, device=DEVICE, dtype=DTYPE)
    bandwidth = x.nbytes / median_time(lambda: x.sum(), 1) * 1e6
    found: list[dict[str, Any]] = []
    try:
        for name in MODELS:
            for row in rows(name, arguments.form, bandwidth):
                said = f"{row['value']} us, {row['ratio']}x ({row['must']}), floor {row['floor_value']}"
                print(f"{row['case']}: {said}", flush=True)
                found.append(row)
            torch.cuda.empty_cache()
    finally:
        arguments.out.write_text(json.dumps({"meta": meta(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
