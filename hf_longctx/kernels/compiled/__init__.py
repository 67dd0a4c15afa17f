"""Operations of the compiled library (`csrc/`), called with ctypes."""

from __future__ import annotations

import torch

from . import (
    antidiagonal,
    attend,
    count,
    delta,
    experts,
    fill,
    host,
    library,
    linear,
    norm,
    prefill,
    project,
    recent,
    rotary,
    select,
    step,
    store,
    streamed,
    tables,
)

OPS = {
    **antidiagonal.OPS,
    **attend.OPS,
    **recent.OPS,
    **prefill.OPS,
    **select.OPS,
    **count.OPS,
    **store.OPS,
    **fill.OPS,
    **host.OPS,
    **norm.OPS,
    **project.OPS,
    **delta.OPS,
    **streamed.OPS,
    **tables.OPS,
    **linear.OPS,
    **experts.OPS,
    **rotary.OPS,
    **step.OPS,
}


def missing() -> str | None:
    """Why no operation runs here, or None."""
    return library.reason(torch.device("cpu"))
