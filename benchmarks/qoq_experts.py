"""Quantized experts against bf16 ones, as JSON: the time of a layer's experts for some tokens, and that of a token.

python benchmarks/qoq_experts.py layers generate --out benchmarks/results/qoq-experts-h200.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from decode_generate import filled, milliseconds
from qoq import DEVICE, DTYPE, FORMS, layers, median_time, meta
from qoq_generate import quantized as with_linears
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import hf_longctx as lc
from hf_longctx.kernels import dispatch
from hf_longctx.kernels.experts import PackedExperts, combine_experts, sort_experts, w4a8_experts
from hf_longctx.kernels.linear import quantize_gated, quantize_tokens
from hf_longctx.weights.qoq.config import QoQConfig
from hf_longctx.weights.qoq.experts import FUSED, QoQExperts, put

MODELS = {"Mixtral 8x7B": (8, 2, 4096, 14336), "Qwen3 30B-A3B": (128, 8, 2048, 768)}
"""Experts, of which each token has so many; channels, and those between the two products."""
LAYERS = {"Mixtral 8x7B": 8, "Qwen3 30B-A3B": 16}
"""Of the model whose tokens are timed."""
TOKEN_MUST = {"Mixtral 8x7B": 1.5, "Qwen3 30B-A3B": 1.5}
CONTEXT = 4096
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


def shaped(name: str) -> Any:
    """Some layers of a model with random weights, on the GPU from the start."""
    experts, top, width, inner = MODELS[name]
    sizes = {"hidden_size": width, "num_attention_heads": 32, "head_dim": 128, "num_experts_per_tok": top}
    sizes |= {"max_position_embeddings": 32768, "eos_token_id": None, "bos_token_id": None, "vocab_size": 32000}
    config: Any
    if name.startswith("Mixtral"):
        more = {"num_local_experts": experts, "intermediate_size": inner, "num_key_value_heads": 8}
        config = MixtralConfig(**sizes, **more, num_hidden_layers=LAYERS[name])
    else:
        more = {"num_experts": experts, "moe_intermediate_size": inner, "num_key_value_heads": 4}
        config = Qwen3MoeConfig(**sizes, **more, num_hidden_layers=LAYERS[name])
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()


def few_bits(model: Any) -> Any:
    """Any 4-bit weights in place of linear layers and experts, with groups of 128."""
    config = QoQConfig()
    for layer in with_linears(model).model.layers:
        made = QoQExperts(layer.mlp.experts, config)
        for own in FUSED.values():
            matrices = getattr(made, own)
            weight = random_experts(matrices.experts, matrices.out_features, matrices.in_features, 4, 128)
            parts = {"weight": weight.codes.view(matrices.weight.shape), "weight_scale": weight.scale}
            put(matrices, {**parts, "weight_groups": weight.groups})
        layer.mlp.experts = made
    return model


def token_row(name: str) -> dict[str, Any]:
    """Time of a token after `CONTEXT` others, patched, with the model's own weights and with those of 4 bits."""
    model = shaped(name)
    found = []
    for bits in (16, 4):
        model = model if bits == 16 else few_bits(lc.unpatch(model))
        torch.cuda.empty_cache()
        lc.patch(model, lc.Dense(), kv="native")
        found.append((milliseconds(model, filled(model, CONTEXT)), lc.report(model)))
    (base, before), (value, report) = found
    return {
        "case": f"a token of {LAYERS[name]} layers of {name}, W4A8 g128, {CONTEXT} before",
        "value": round(value, 3),
        "unit": "ms/token",
        "baseline": "bf16 weights",
        "baseline_value": round(base, 3),
        "ratio": round(base / value, 3),
        "floor_value": None,
        "must": f">= {TOKEN_MUST[name]}x",
        "met": base / value >= TOKEN_MUST[name],
        "shapes": {"rows": 1, "tokens": CONTEXT, "layers": LAYERS[name]},
        "graphs": [before.graphs, report.graphs],
        "eager": [before.eager, report.eager],
    }


def read_rate() -> float:
    """Bytes per second that are read."""
    x = torch.ones(1 << 30, device=DEVICE, dtype=DTYPE)
    return x.nbytes / median_time(lambda: x.sum(), 1) * 1e6


def layer_rows(form: str) -> Iterator[dict[str, Any]]:
    """All models."""
    bandwidth = read_rate()
    for name in MODELS:
        yield from rows(name, form, bandwidth)
        torch.cuda.empty_cache()


@torch.no_grad()
def main() -> None:
    """Run the parts that are named; write what they found, also of those before one that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["layers", "generate"])
    parser.add_argument("--form", choices=list(FORMS), default="g128")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    made = {"layers": lambda: layer_rows(arguments.form), "generate": lambda: map(token_row, MODELS)}
    try:
        for part in arguments.parts:
            for row in made[part]():
                said = f"{row['value']} {row['unit']}, {row['ratio']}x ({row['must']}), floor {row['floor_value']}"
                print(f"{row['case']}: {said}", flush=True)
                found.append(row)
    finally:
        arguments.out.write_text(json.dumps({"meta": meta(), "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
