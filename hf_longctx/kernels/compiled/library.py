"""The compiled library: where it is, why it is not used, and its argument blocks (`csrc/hf_longctx.h`)."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ..types import Packed

ABI = 1
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class HflRows(ctypes.Structure):
    """`hfl_rows`."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("b", "h", "t")),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("scale_b", "scale_h")),
        ("bits", ctypes.c_int32),
    )


class HflAttend(ctypes.Structure):
    """`hfl_attend`."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in ("batch", "q_heads", "kv_heads", "tokens", "stored", "dim", "v_dim", "dtype")
        ),
        *((name, ctypes.c_void_p) for name in ("q", "q_before", "q_sinks")),
        *((name, ctypes.c_int64) for name in ("q_b", "q_h", "q_t")),
        *((name, HflRows) for name in ("k", "v")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("out_b", "out_h", "out_t")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_void_p) for name in ("sink_logits", "slopes", "q_pos")),
        ("q_pos_b", ctypes.c_int64),
        ("k_pos", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("k_pos_b", "sink", "window", "lap", "offset")),
        *((name, ctypes.c_void_p) for name in ("ids", "pages")),
        *((name, ctypes.c_int64) for name in ("ids_b", "ids_h", "ids_n")),
        *((name, ctypes.c_int32) for name in ("select_heads", "chosen", "block")),
        *((name, ctypes.c_void_p) for name in ("scratch", "counters")),
        ("splits", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
    )


def path() -> Path:
    """Where the library is looked for: `$HF_LONGCTX_LIB`, or beside the package."""
    return Path(os.environ.get("HF_LONGCTX_LIB") or Path(__file__).parents[2] / "_C.so")


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    try:
        library = ctypes.CDLL(str(path()))
        abi = library.hfl_abi()
    except (OSError, AttributeError) as error:
        return None, f"its library cannot be loaded ({error})"
    if abi != ABI:
        return None, f"its library has interface {abi}, this package {ABI}"
    for name in ("hfl_attend_cpu", "hfl_attend_cuda"):
        getattr(library, name).restype = ctypes.c_char_p
    library.hfl_attend_scratch.restype = library.hfl_attend_counters.restype = ctypes.c_int64
    return library, ""


def reason(device: torch.device) -> str | None:
    """Why operations on a device cannot run in the library, or None."""
    library, why = _load()
    if library is None:
        return why
    if device.type == "cuda":
        return None if library.hfl_has_cuda() else "its library was built without CUDA"
    return None if device.type == "cpu" else f"has no code for {device.type}"


def library() -> ctypes.CDLL:
    """The library; there is one where `reason` says None."""
    loaded = _load()[0]
    assert loaded is not None
    return loaded


def call(name: str, block: ctypes.Structure, *more: int) -> None:
    """Run an operation.

    Raises:
        RuntimeError: the library refused, and did nothing.
    """
    message = getattr(library(), name)(ctypes.byref(block), *more)
    if message is not None:
        raise RuntimeError(f"{name}: {message.decode()}")


def pointer(x: Tensor | None) -> int | None:
    """Address of the first element."""
    return None if x is None else x.data_ptr()


def rows(x: Tensor | Packed) -> HflRows:
    """Keys or values `[B, H, S, D]`."""
    if isinstance(x, Tensor):
        return HflRows(x.data_ptr(), *x.stride()[:3])
    places = (x.scale.data_ptr(), x.zero.data_ptr(), *x.scale.stride()[:2])
    return HflRows(x.payload.data_ptr(), *x.payload.stride()[:3], *places, x.bits)


def stream(device: torch.device) -> int:
    """The stream on which torch works now."""
    return torch.cuda.current_stream(device).cuda_stream


_COUNTERS: dict[tuple[torch.device, int], Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """Zeros `[>= count]`, int32, of a device and its current stream; operations leave them zero."""
    key = (device, stream(device))
    held = _COUNTERS.get(key)
    if held is None or len(held) < count:
        held = _COUNTERS[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return held
