"""How many bytes a plan holds, and whether they are there, before a prompt is read."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from .cache.cache import LongContextCache
from .cache.placement import HostLRU
from .models import ModelFacts
from .plan import Plan

PROMPT = 1024
"""Calls of fewer tokens are not checked: growth by a few tokens is not worth a look at the device."""


@dataclass(frozen=True)
class Needs:
    """Bytes of a cache.

    Args:
        layers: of each layer, on its device.
        host: elsewhere: in host memory (None), or in files in a folder.
    """

    layers: tuple[int, ...]
    host: dict[str | None, int]

    @property
    def device(self) -> int:
        """On all devices."""
        return sum(self.layers)


def needs(facts: ModelFacts, cache: LongContextCache, rows: int, tokens: int, dtype: torch.dtype) -> Needs:
    """Bytes that a cache holds after `tokens` tokens in each of `rows` rows, room for more to come aside."""
    layers, host = [], defaultdict[str | None, int](int)
    for layer, stack in zip(facts.layers, cache.stacks, strict=True):
        device = 0
        for group, store in stack.stores:
            here, there = store.bytes_at(tokens, layer.head_dim, dtype.itemsize)
            device += rows * len(group.kv_heads) * here
            if isinstance(group.policy.placement, HostLRU):
                host[group.policy.placement.disk] += rows * len(group.kv_heads) * there
        layers.append(device)
    return Needs(tuple(layers), dict(host))


def kv_bytes(facts: ModelFacts, plan: Plan, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes on the device of what a plan holds after `tokens` tokens in each of `rows` rows."""
    return needs(facts, LongContextCache(plan), rows, tokens, dtype).device


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
    """Refuse a call whose keys and values may not lie where they would, or cannot, before anything is computed.

    Raises:
        MemoryError: says how many bytes are needed and there, and what would fit.
    """
    seen = cache.ledger.columns + tokens
    most = cap(plan)
    if tokens < PROMPT and most is None:
        return
    whole = needs(facts, cache, rows, seen, dtype)
    in_memory = whole.host.get(None, 0)
    if most is not None and in_memory > most:
        raise MemoryError(
            f"HostLRU: expected at most {gib(most)} of host memory for the whole cache (ram); needs {gib(in_memory)} "
            f"for {seen} tokens in {rows} rows. Raise ram, give a folder as disk, store keys and values in fewer bits, "
            "or shorten the text."
        )
    if tokens < PROMPT:
        return
    _check_host(whole, needs(facts, cache, rows, cache.ledger.columns, dtype), plan, seen)
    places = facts.places or (device,) * len(facts.layers)
    _check_devices(whole, cache, plan, places, seen, dense_kv_bytes(facts, rows, 1, dtype))


def _check_devices(
    whole: Needs, cache: LongContextCache, plan: Plan, places: Sequence[torch.device], seen: int, dense: int
) -> None:
    """Refuse more than there is on the device of any layer; dense: bytes of a token of all rows in all layers."""
    held = [sum(store.kv_bytes for _, store in stack.stores) for stack in cache.stacks]
    for place in dict.fromkeys(places):
        here = [i for i, own in enumerate(places) if own == place]
        needed, free = sum(whole.layers[i] - held[i] for i in here), available_bytes(place)
        if needed <= free:
            continue
        per_token = max(1, dense * len(here) // len(places))
        raise MemoryError(
            f"hf_longctx: expected room for the keys and values of {seen} tokens under plan '{plan.method}' on "
            f"{place}; needs {gib(needed)} more, {gib(free)} are there. Shorten the text, or patch with "
            f"'streaming_llm' and a window below {max(1, free // per_token)} tokens."
        )


def available_beside(facts: ModelFacts) -> int:
    """Bytes that can still be allocated for all layers, each where it lies: the device with least sets the bound."""
    if not facts.places:
        return available_bytes(facts.place)
    layers = len(facts.places)
    return min(available_bytes(place) * layers // facts.places.count(place) for place in set(facts.places))


def cap(plan: Plan) -> int | None:
    """The least cap on host memory that a policy sets, or None."""
    placements = (group.policy.placement for layer in plan.layers for group in layer.groups)
    caps = (p.ram_bytes for p in placements if isinstance(p, HostLRU) and p.disk is None)
    return min((cap for cap in caps if cap is not None), default=None)


def _check_host(whole: Needs, before: Needs, plan: Plan, tokens: int) -> None:
    """Refuse more than there is in host memory, or in a folder."""
    for disk, size in whole.host.items():
        needed = size - before.host.get(disk, 0)
        free = available_bytes(torch.device("cpu")) if disk is None else shutil.disk_usage(disk).free
        if needed > free:
            raise MemoryError(
                f"HostLRU: expected room for the keys and values of {tokens} tokens under plan '{plan.method}' in "
                f"{'host memory' if disk is None else disk}; needs {gib(needed)} more, {gib(free)} are there. "
                f"Give {'a' if disk is None else 'another'} folder as disk, store keys and values in fewer bits, or "
                "shorten the text."
            )


def gib(size: int) -> str:
    """Bytes for a message."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"
