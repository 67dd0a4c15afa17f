"""Time of a token of `generate()` on a model of Llama 3 8B's shape with random weights and a filled cache."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

import hf_longctx as lc
from hf_longctx.cache.cache import LongContextCache
from hf_longctx.cache.step import Step
from hf_longctx.patch import state_of

K = 1024
NEW = 48
GATES = [[float(head % 2) for head in range(8)] for _ in range(32)]


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Args:
        name: of the line.
        method: of the package.
        tokens: of the context.
        must: milliseconds a token at most, or times the dense plan's; None: it must run at all.
        of_dense: the dense plan at the same length is the baseline, and `must` a ratio.
        kv: as in `patch`.
    """

    name: str
    method: Any
    tokens: int
    must: float | None
    of_dense: bool = False
    kv: str | None = None


LINES = (
    Line("generate() 8B, 4K, B=1: dense", lc.Dense(), 4 * K, 5.5),
    Line("generate() 8B, 128K, B=1: dense", lc.Dense(), 128 * K, 10.5),
    Line("generate() 8B, 128K, B=1: Quest 4096", lc.Quest(4096, page=16), 128 * K, 6.5),
    Line("generate() 8B, 128K, B=1: LServe + KV4", lc.LServe(pattern=GATES, kv="int4"), 128 * K, 6.0),
    Line("DuoAttention 50 %, 512K, B=1", lc.DuoAttention(pattern=GATES, sparsity=0.5), 512 * K, 1.6, of_dense=True),
    Line(
        "4M tokens, DuoAttention 50 % + KV4, B=1",
        lc.DuoAttention(pattern=GATES, sparsity=0.5),
        4096 * K,
        None,
        kv="int4",
    ),
)


class Clock(BaseStreamer):
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Note the time; `generate` hands the token over on the host, so it is there."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""


def model_8b() -> Any:
    """Llama 3 8B with random weights, on the GPU from the start."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=1024 * K,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=None,
        eos_token_id=None,
        dtype=torch.bfloat16,
    )
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def filled(model: Any, tokens: int) -> LongContextCache:
    """A cache of the plan in force after so many random tokens, as a prompt would leave it."""
    state = state_of(model)
    assert state is not None
    cache = state.fresh_cache()
    step = Step.of(0, tokens, model.device, None, None)
    for layer in cache.stacks:
        for group, store in layer.stores:
            shape = (1, len(group.kv_heads), tokens, 128)
            store.write(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in "kv"), step)
    cache.ledger.rows, cache.ledger.columns = 1, tokens
    cache.measure()
    return cache


def milliseconds(model: Any, cache: LongContextCache) -> float:
    """Median time from one token to the next, once the step has been recorded."""
    ids = torch.zeros(1, cache.ledger.columns + 1, dtype=torch.int64, device=model.device)
    clock = Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=NEW,
        do_sample=False,
        streamer=clock,
    )
    gaps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    return 1000 * statistics.median(gaps[NEW // 3 :])


def generate_rows() -> Iterator[dict[str, Any]]:
    """A row for each line: its baseline is the dense plan, or the same without CUDA graphs."""
    model = model_8b()
    for line in LINES:
        value, report = _run(model, line.method, line, True)
        base, other = _run(model, lc.Dense() if line.of_dense else line.method, line, line.of_dense)
        ratio = base / value if base and value else None
        reached = ratio if line.of_dense else value
        must, met = "held and decoded", reached is not None
        if line.must is not None:
            must = f">= {line.must:g}x" if line.of_dense else f"<= {line.must:g} ms/token"
            met = met and (reached >= line.must if line.of_dense else reached <= line.must)
        yield {
            "case": line.name,
            "value": value,
            "unit": "ms/token",
            "baseline": "dense plan" if line.of_dense else "the same without CUDA graphs",
            "baseline_value": base,
            "ratio": ratio,
            "floor_value": None,
            "must": must,
            "met": met,
            "shapes": {"rows": 1, "tokens": line.tokens},
            "kv_bytes": report.kv_bytes,
            "baseline_kv_bytes": other.kv_bytes,
            "graphs": report.graphs,
            "graph_bytes": report.graph_bytes,
            "eager": report.eager,
        }


def _run(model: Any, method: Any, line: Line, graphs: bool) -> tuple[float | None, lc.Report]:
    """Milliseconds of a token, None where the cache finds no room; and what the model then says of itself."""
    lc.patch(model, method, kv=line.kv, cuda_graph=graphs)
    value = cache = None
    try:
        cache = filled(model, line.tokens)
        value = round(milliseconds(model, cache), 3)
    except torch.OutOfMemoryError as error:
        print(f"{line.name}: {str(error).splitlines()[0]}")
    report = lc.report(model)
    del cache
    gc.collect()
    torch.cuda.empty_cache()
    return value, report
