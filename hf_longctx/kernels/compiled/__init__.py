"""Operations of the compiled library (`csrc/`), called with ctypes."""

from __future__ import annotations

import torch

from . import antidiagonal, attend, library, select, store

OPS = {**antidiagonal.OPS, **attend.OPS, **select.OPS, **store.OPS}


def missing() -> str | None:
    """Why no operation runs here, or None."""
    return library.reason(torch.device("cpu"))
