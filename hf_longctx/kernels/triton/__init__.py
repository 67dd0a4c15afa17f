"""Operations in Triton, for GPUs from sm_80 on; imported when the first call is on such a device."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Implementation, wanted
from ..types import Packed

CAPABILITY = (8, 0)
"""The least that its kernels are compiled for."""


@cache
def _absent() -> str | None:
    return None if find_spec("triton") else "needs triton: pip install 'hf_longctx[triton]'"


def missing() -> str | None:
    """Why no operation runs here, or None."""
    if _absent() or torch.cuda.is_available():
        return _absent() or reason(torch.device("cuda", torch.cuda.current_device()))
    return None if _interprets() else _NOWHERE


_NOWHERE = "runs on CUDA devices; on a CPU in its interpreter only (TRITON_INTERPRET=1, HF_LONGCTX_BACKEND=triton)"


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def reason(device: torch.device) -> str | None:
    """Why no operation runs on a device, or None. On a CPU only the interpreter does, and only if it is asked for."""
    if _absent():
        return _absent()
    if device.type == "cuda":
        return _too_old(device.index)
    if device.type != "cpu":
        return f"is for CUDA devices, not for {device.type}"
    return None if _interprets() and wanted() == "triton" else _NOWHERE


@cache
def _too_old(index: int | None) -> str | None:
    if torch.version.hip is not None:
        return "was not tried on ROCm"
    found = torch.cuda.get_device_capability(index)
    return None if found >= CAPABILITY else f"needs sm_80 or later; this GPU is sm_{found[0]}{found[1]}"


@cache
def _module(name: str) -> Any:
    return import_module(f".{name}", __name__)


def _lazy(name: str, module: str, which: str = "") -> Implementation:
    def reject(*args: Any) -> str | None:
        first: Tensor | Packed = args[1] if name == "fill_pages" else args[0]  # there groups come before tokens
        why = reason(first.device)
        return getattr(_module(module), f"reject{which}")(*args) if why is None else why

    return Implementation(lambda *args: getattr(_module(module), f"run{which}")(*args), reject)


_EACH = (
    "attend_blocks",
    "attend_mass",
    "attend_pages",
    "score_pages",
    "score_antidiagonal",
    "pick_blocks",
    "append_pages",
    "fill_pages",
    "delta_linear",
    "linear_with_delta",
    "linears_with_delta",
    "quantize_tokens",
)

OPS = {name: _lazy(name, name) for name in _EACH} | {
    f"quantize_{after}": _lazy(f"quantize_{after}", "quantize_tokens", f"_{after}") for after in ("norm", "gated")
}
