"""Time to the first token, and the most memory that it takes, on Llama 3 8B's shape with random weights."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from decode_generate import GATES, K, model_8b

import hf_longctx as lc


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Args:
        name: of the line.
        tokens: of the prompt.
        method: of the package; None: the model as it comes, with torch's fused attention.
        must: at least so many times faster than `than`, or with `gigabytes` at most so much memory.
        than: the line that it is measured against.
        gigabytes: the value is the most memory that is held.
    """

    name: str
    tokens: int
    method: Any
    must: float | None = None
    than: str | None = None
    gigabytes: bool = False


def lines(tokens: int) -> tuple[Line, ...]:
    """What is measured at a length. With random weights attention is even: a share of it is that share of blocks."""
    share = lc.XAttention(tau=0.066, dense_below=0)
    size = f"{tokens // K}K"
    stock, dense = f"TTFT {size}, stock", f"TTFT {size}, dense plan"
    whole, half = lc.Dense(), lc.DuoAttention(pattern=GATES, sparsity=0.5)
    return (
        Line(stock, tokens, None),
        Line(dense, tokens, whole, 1 / 1.03, stock),
        Line(f"TTFT {size}, Duo 50 %", tokens, half, 1.5, dense),
        Line(f"TTFT {size}, XAttention at 7.3 %, against stock", tokens, share, 2.4, stock),
        Line(f"TTFT {size}, XAttention at 7.3 %, against the dense plan", tokens, share, 1.7, dense),
        Line(f"peak memory at {size}, dense plan", tokens, whole, 40, stock, gigabytes=True),
        Line(f"peak memory at {size}, XAttention", tokens, share, 40, stock, gigabytes=True),
    )


def first_token(model: Any, method: Any, tokens: int) -> tuple[float, float, float | None]:
    """Seconds of a prompt and its first token, the most GB that were held, and the share of blocks that were read."""
    if method is None:
        lc.unpatch(model)
    else:
        lc.patch(model, method)
    ids = torch.randint(0, 128256, (1, tokens), device=model.device, generator=torch.Generator("cuda").manual_seed(0))
    for prompt in (ids[:, : 4 * K], ids):  # the first sets up
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False)
        stop.record()
        stop.synchronize()
    read = None if method is None else lc.report(model).density
    return start.elapsed_time(stop) / 1000, torch.cuda.max_memory_allocated() / 1e9, read


@torch.no_grad()
def generate_rows(lengths: list[int]) -> Iterator[dict[str, Any]]:
    """A row for each line; what two lines share is measured once."""
    model = model_8b()
    for tokens in lengths:
        seen: dict[int, tuple[float, float, float | None]] = {}
        table = lines(tokens)
        for line in table:
            if id(line.method) not in seen:
                seen[id(line.method)] = first_token(model, line.method, tokens)
            seconds, held, read = seen[id(line.method)]
            than = next((seen[id(other.method)] for other in table if other.name == line.than), None)
            value, base = (held, than and than[1]) if line.gigabytes else (seconds, than and than[0])
            ratio = base / value if base else None
            must, met = None, None
            if line.must is not None:
                must = f"<= {line.must:g} GB" if line.gigabytes else f">= {line.must:.3g}x"
                met = value <= line.must if line.gigabytes else ratio is not None and ratio >= line.must
            yield {
                "case": line.name,
                "value": round(value, 3),
                "unit": "GB" if line.gigabytes else "s",
                "density": read,
                "baseline": line.than,
                "baseline_value": base and round(base, 3),
                "ratio": ratio and round(ratio, 3),
                "floor_value": None,
                "must": must,
                "met": met,
                "shapes": {"rows": 1, "tokens": tokens},
            }
