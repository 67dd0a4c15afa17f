"""Bytes of tensors that an object holds, whoever made it: counted from storages, not told by it."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..plan import Plan


def reached(root: Any) -> Iterator[Tensor]:
    """Every tensor that is reached from an object, whatever holds it, but not through modules, plans and functions.

    A tensor that is made of others, as quantized ones are, is given as those.
    """
    seen, todo = {id(root)}, [root]
    while todo:
        here = todo.pop()
        if isinstance(here, Tensor):
            parts = here.__tensor_flatten__()[0] if hasattr(here, "__tensor_flatten__") else ()
            if not parts:
                yield here
            todo += [getattr(here, name) for name in parts]
            continue
        for x in gc.get_referents(here):
            if id(x) not in seen and not isinstance(x, type | nn.Module | Plan) and not callable(x):
                seen.add(id(x))
                todo.append(x)


def storages(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Bytes of all storages on `device` and on the `host`, each counted once; where a CPU computes, all are `host`."""
    sizes: dict[tuple[str, int], int] = {}
    for x in tensors:
        where = "device" if x.device.type != "cpu" else "host"
        sizes[where, x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return {side: sum(n for (where, _), n in sizes.items() if where == side) for side in ("device", "host")}


def held(cache: Any, device: torch.device) -> tuple[int, int]:
    """Bytes that somebody else's cache holds on a device, and beside it in host memory."""
    sizes = storages(reached(cache))
    return (sizes["host"], 0) if device.type == "cpu" else (sizes["device"], sizes["host"])
