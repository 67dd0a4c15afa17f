"""A cache taken apart into tensors and plain values, and put together again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..plan import Plan, Retention
from ..plan.text import pack, unpack
from .cache import LongContextCache


def take_apart(cache: LongContextCache) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and values that JSON can hold, from which `put_together` makes an equal cache.

    Args:
        cache: one that has seen tokens, and whose last call ran to its end.
    """
    ledger = cache.ledger
    tensors = {name: x for name, x in (("lengths", ledger.lengths), ("tail", ledger.tail)) if x is not None}
    values: dict[str, Any] = {
        "columns": ledger.columns,
        "gone": ledger.gone,
        "rows": ledger.rows,
        "recording": cache.stacks[0].recording,
        "floors": [pack(retention) for retention in cache.floors],
        "stores": {},
    }
    tensors.update({f"floor.{i}": floor for i, floor in enumerate(cache.floors.values())})
    for layer, stack in enumerate(cache.stacks):
        for number, (_, store) in enumerate(stack.stores):
            where = f"{layer}.{number}"
            states = [("store", store.state(ledger.columns, ledger.row_lengths)), ("kept", store.kept.state())]
            if store.index is not None:
                states.append(("index", store.index.state()))
            for kind, (more, about) in states:
                tensors.update({f"{where}.{kind}.{name}": x for name, x in more.items()})
                values["stores"][f"{where}.{kind}"] = about
    if cache.angles is not None:
        more, values["angles"] = cache.angles.state(ledger.columns)
        tensors.update({f"angles.{name}": x for name, x in more.items()})
    return tensors, values


def put_together(
    plan: Plan, tensors: Mapping[str, Tensor], values: Mapping[str, Any], devices: Sequence[torch.device]
) -> LongContextCache:
    """The cache that was taken apart.

    Args:
        plan: of the cache.
        tensors: from `take_apart`, on any device; not shared with the cache afterwards.
        values: from `take_apart`.
        devices: of each layer.
    """
    cache = LongContextCache(plan)
    ledger = cache.ledger
    ledger.columns, ledger.gone, ledger.rows = values["columns"], values.get("gone", 0), values["rows"]
    ledger.lengths, ledger.tail = (_copy(tensors, name, devices[0]) for name in ("lengths", "tail"))
    for i, retention in enumerate(values["floors"]):
        cache.floors[cast(Retention, unpack(retention))] = tensors[f"floor.{i}"].clone().to(devices[0])
    if values["recording"]:
        cache.activate_past_recording()  # type: ignore[no-untyped-call]
    for layer, stack in enumerate(cache.stacks):
        stack.is_initialized = True
        for number, (_, store) in enumerate(stack.stores):
            for kind, target in (("store", store), ("kept", store.kept), ("index", store.index)):
                if target is None:
                    continue
                where = f"{layer}.{number}.{kind}"
                target.restore(_under(tensors, where, devices[layer]), values["stores"][where])
    if cache.angles is not None:
        cache.angles.restore(_under(tensors, "angles", devices[0]), values["angles"])
    cache.measure()
    return cache


def _copy(tensors: Mapping[str, Tensor], name: str, device: torch.device) -> Tensor | None:
    return tensors[name].clone().to(device) if name in tensors else None


def _under(tensors: Mapping[str, Tensor], where: str, device: torch.device) -> dict[str, Tensor]:
    """Those whose name begins with `where` and a dot, copied to a device, by the rest of the name."""
    return {
        name.removeprefix(f"{where}."): x.clone().to(device)
        for name, x in tensors.items()
        if name.startswith(f"{where}.")
    }
