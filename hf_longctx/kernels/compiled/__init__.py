"""Operations of the compiled library (`csrc/`), called with ctypes."""

from __future__ import annotations

import torch

from . import attend, library, prefill, select, store

OPS = {**attend.OPS, **prefill.OPS, **select.OPS, **store.OPS}


def missing() -> str | None:
    """Why no operation runs here, or None."""
    return library.reason(torch.device("cpu"))
