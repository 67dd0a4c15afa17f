"""How many bytes a plan holds, and whether they are there, before a prompt is read."""

from __future__ import annotations

import psutil
import torch

from .cache.cache import LongContextCache
from .models import ModelFacts
from .plan import Plan

PROMPT = 1024
"""Calls of fewer tokens are not checked: growth by a few tokens is not worth a look at the device."""


def kv_bytes(facts: ModelFacts, plan: Plan, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that a plan holds after `tokens` tokens in each of `rows` rows."""
    total = 0
    for layer, layer_plan in zip(facts.layers, plan.layers, strict=True):
        for group in layer_plan.groups:
            retention = group.policy.retention
            window = retention.reach(2)
            held = tokens if window is None else min(tokens, retention.sink + window)
            total += len(group.kv_heads) * held * layer.head_dim
    return 2 * rows * dtype.itemsize * total


def dense_kv_bytes(facts: ModelFacts, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of the whole text: every token, in every layer and KV head."""
    return 2 * rows * tokens * dtype.itemsize * sum(layer.kv_heads * layer.head_dim for layer in facts.layers)


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + held)
    return int(psutil.virtual_memory().available)


def check_room(
    facts: ModelFacts,
    plan: Plan,
    cache: LongContextCache,
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Refuse a prompt whose keys and values cannot fit, before anything is computed.

    Raises:
        MemoryError: says how many bytes are needed and there, and what would fit.
    """
    if tokens < PROMPT:
        return
    seen = cache.ledger.columns + tokens
    needed = kv_bytes(facts, plan, rows, seen, dtype) - cache.kv_bytes
    free = available_bytes(device)
    if needed <= free:
        return
    per_token = max(1, dense_kv_bytes(facts, rows, 1, dtype))
    raise MemoryError(
        f"hf_longctx: expected room for the keys and values of {seen} tokens under plan '{plan.method}' on {device}; "
        f"needs {needed / 2**30:.1f} GiB more, {free / 2**30:.1f} GiB are there. Shorten the text, or patch with "
        f"'streaming_llm' and a window below {max(1, free // per_token)} tokens."
    )
