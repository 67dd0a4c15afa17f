"""Which backend runs an operation: the first that takes the arguments, or the one that was asked for, or an error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from torch.compiler import is_compiling

from ..errors import UnsupportedError

ORDER = ("flash", "compiled", "triton", "flex", "torch", "reference")
"""Backends, fastest first. `reference` defines every operation and always exists."""

OPS = (
    "attend_blocks",
    "attend_heads",
    "attend_pages",
    "attend_mass",
    "attend_recent",
    "step_recent",
    "attend_layer",
    "score_pages",
    "score_antidiagonal",
    "pick_blocks",
    "count_blocks",
    "rotate",
    "rotate_heads",
    "rms_norm",
    "gated",
    "project",
    "project_gated",
    "append",
    "append_pages",
    "fill_pages",
    "bring_blocks",
    "copy_blocks",
    "encode_kv",
    "decode_kv",
    "delta_linear",
    "linear_with_delta",
    "linears_with_delta",
    "linear_of_rows",
    "quantize_tokens",
    "quantize_norm",
    "quantize_gated",
    "w4a8_linear",
    "w4a8_linears",
    "w4a8_linears_of",
    "sort_experts",
    "w4a8_experts",
    "combine_experts",
)

LACKS = "does not have it"
"""How the reason ends of a backend that has no such operation, on any machine."""

_VARIABLE = "HF_LONGCTX_BACKEND"
_MODULES = {name: name for name in ORDER} | {"torch": "fused"}
_WANTED: ContextVar[str | None] = ContextVar("hf_longctx_backend", default=None)
_SAID: ContextVar[tuple[str | None] | None] = ContextVar("hf_longctx_backend_of_call", default=None)
_LAST: dict[str, str] = {}
_CHECKED = bool(os.environ.get("HF_LONGCTX_DEBUG"))
"""Whether arguments are looked at, which waits for the device."""


@dataclass(frozen=True)
class Row:
    """One cell of the operation x backend table."""

    op: str
    backend: str
    available: bool
    reason: str


@dataclass(frozen=True)
class Implementation:
    """A backend's function for one operation, and `reject`, which says why it does not take some arguments."""

    run: Callable[..., Any]
    reject: Callable[..., str | None] = lambda *args: None


def _load() -> dict[str, dict[str, Implementation]]:
    return {name: import_module(f".{module}", __package__).OPS for name, module in _MODULES.items()}


_TABLE: dict[str, dict[str, Implementation]] = {}


def _table() -> dict[str, dict[str, Implementation]]:
    if not _TABLE:
        _TABLE.update(_load())
    return _TABLE


def look_once(during: bool) -> None:
    """Look at the variable HF_LONGCTX_BACKEND now, and not again until this ends: a call asks some hundred times."""
    _SAID.set((os.environ.get(_VARIABLE),) if during else None)


def wanted() -> str | None:
    """The backend that was asked for by `use_backend` or the variable HF_LONGCTX_BACKEND, or None.

    Raises:
        ValueError: no backend has that name.
    """
    said = _SAID.get()
    name = _WANTED.get() or (os.environ.get(_VARIABLE) if said is None else said[0]) or None
    if name is not None and name not in ORDER:
        raise ValueError(
            f"HF_LONGCTX_BACKEND: expected one of {', '.join(ORDER)}; got '{name}'. Unset it for the automatic choice."
        )
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every operation on one backend inside the block; an operation that it does not take raises.

    Raises:
        ValueError: no backend has that name.
    """
    token = _WANTED.set(name)
    try:
        wanted()
        yield
    finally:
        _WANTED.reset(token)


def chosen(op: str, *args: Any) -> str:
    """The wanted backend, or the first in `ORDER` that takes the arguments.

    Raises:
        UnsupportedError: the wanted backend does not take them; says why.
    """
    table, only = _table(), wanted()
    reasons = []
    for backend in (only,) if only else ORDER:
        implementation = table[backend].get(op)
        reason = LACKS if implementation is None else implementation.reject(*args)
        if implementation is not None and reason is None:
            return backend
        reasons.append(f"{backend}: {reason}.")
    raise UnsupportedError(
        f"{op}: no backend takes these arguments. {' '.join(reasons)} Leave the choice to us: unset HF_LONGCTX_BACKEND."
    )


def call(op: str, *args: Any) -> Any:
    """Run `op` on the backend that is `chosen`; inside `torch.compile`, put it into the graph.

    Raises:
        UnsupportedError: as `chosen`.
    """
    if is_compiling():
        from . import traced

        return traced.call(op, args)
    if _CHECKED:
        return run(op, *args)
    backend = chosen(op, *args)
    _LAST[op] = backend
    return _TABLE[backend][op].run(*args)


def run(op: str, *args: Any) -> Any:
    """`call`, whoever traces it; where HF_LONGCTX_DEBUG is set, after a look at the arguments (`checks.py`)."""
    if _CHECKED:
        from . import checks

        checks.check(op, args)
    backend = chosen(op, *args)
    _LAST[op] = backend
    return _TABLE[backend][op].run(*args)


def last_used() -> dict[str, str]:
    """The backend that each operation ran on last, in this process."""
    return dict(_LAST)


def table() -> list[Row]:
    """Every operation on every backend, and why not where there is a no."""
    from . import compiled, flash, triton

    rows = []
    without = {"flash": flash.missing(), "compiled": compiled.missing(), "triton": triton.missing()}
    for op in OPS:
        for backend in ORDER:
            has = op in _table()[backend]
            reason = without.get(backend) if has else f"the {backend} backend {LACKS}"
            rows.append(Row(op, backend, reason is None, reason or ""))
    return rows
