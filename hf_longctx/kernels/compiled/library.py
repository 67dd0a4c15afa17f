"""The compiled library: where it is, why it is not used, and its argument blocks (`csrc/hf_longctx.h`)."""

from __future__ import annotations

import ctypes
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..types import Packed

ABI = 8
FEW = 8
"""Queries, or fresh tokens, of a row that an operation takes."""

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class HflRows(ctypes.Structure):
    """`hfl_rows`."""

    __slots__ = ()  # a field that is not there cannot be set
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

    __slots__ = ()
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


class HflPrefill(ctypes.Structure):
    """`hfl_prefill`."""

    __slots__ = ()
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("batch", "q_heads", "kv_heads", "tokens", "stored", "dim", "dtype")),
        ("q", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("q_b", "q_h", "q_t")),
        *((name, HflRows) for name in ("k", "v")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("out_b", "out_h", "out_t")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
        *((name, ctypes.c_void_p) for name in ("sink_logits", "slopes", "q_pos")),
        ("q_pos_b", ctypes.c_int64),
        ("k_pos", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("k_pos_b", "sink", "window", "lap", "offset", "clamp")),
        ("sink_pos", ctypes.c_void_p),
        ("sink_pos_b", ctypes.c_int64),
        ("inv_freq", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("pairs", "interleaved")),
        *((name, ctypes.c_void_p) for name in ("ids", "pages")),
        *((name, ctypes.c_int64) for name in ("ids_b", "ids_h", "ids_n")),
        *((name, ctypes.c_int32) for name in ("select_heads", "chosen", "block", "q_block")),
        ("places", ctypes.c_void_p),
        ("all_heads", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("counter", "stream")),
    )


def path() -> Path:
    """Where the library is looked for: `$HF_LONGCTX_LIB`, or beside the package."""
    return Path(os.environ.get("HF_LONGCTX_LIB") or Path(__file__).parents[2] / "_C.so")


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    here = path()
    if not here.exists():
        said = here.with_suffix(".txt")
        return None, said.read_text().strip() if said.exists() else f"there is no {here.name}: install the package"
    try:
        library = ctypes.CDLL(str(here))
        abi = library.hfl_abi()
        if abi != ABI:
            return None, f"its library has interface {abi}, this package {ABI}: install the package again"
        for name in ("hfl_version", *(f"hfl_{op}_{kind}" for op, kinds in _OPS.items() for kind in kinds)):
            getattr(library, name).restype = ctypes.c_char_p
        for name in _SIZES:
            getattr(library, f"hfl_{name}").restype = ctypes.c_int64
    except (OSError, AttributeError) as error:
        return None, f"its library cannot be loaded ({error})"
    return library, ""


_OPS = {
    **dict.fromkeys(
        ("attend", "score", "pick", "append", "fill", "decode", "delta", "quantize", "linear"), ("cpu", "cuda")
    ),
    **dict.fromkeys(("antidiagonal", "pick_mass", "prefill", "bring", "copy", "count"), ("cuda",)),
    **dict.fromkeys(("norm", "turn", "gated", "joined", "layer", "project", "recent", "streamed", "tables"), ("cuda",)),
    **dict.fromkeys(("sort", "experts", "combine"), ("cuda",)),
}


_SIZES = (
    "attend_scratch",
    "attend_counters",
    "pick_scratch",
    "layer_scratch",
    "recent_scratch",
    "recent_counters",
    "antidiagonal_scratch",
    "delta_scratch",
    "merged_scratch",
    "linear_scratch",
)


def reason(device: torch.device) -> str | None:
    """Why operations on a device cannot run in the library, or None."""
    library, why = _load()
    return why if library is None else _reason_on(device)


@cache
def _reason_on(device: torch.device) -> str | None:
    """The same where there is a library; known of each device, as it is asked some hundred times in a call."""
    if device.type != "cuda":
        return f"has no code for {device.type}" if device.type != "cpu" else None
    major, minor = torch.cuda.get_device_capability(device)
    if runs_on(about(), major, minor):
        return None
    said = path().with_suffix(".txt")
    why = f" ({said.read_text().strip()})" if said.exists() else ""
    return f"has no code for sm_{major}{minor}: its library is for {about()}{why}"


def runs_on(architectures: str, major: int, minor: int) -> bool:
    """True if code for `architectures` (as `hfl_version` names them) runs on a device of that capability.

    Machine code runs on devices of the same major number from its minor number on, that of an `a` on just its own;
    what was compiled for a virtual architecture runs on all later ones.
    """
    have = 10 * major + minor
    for kind, number, exact in re.findall(r"(sm|compute)_(\d+)([af]?)", architectures):
        want = int(number)
        if kind == "compute" or exact == "a":
            fits = have == want if exact == "a" else have >= want
        else:
            fits = have // 10 == want // 10 and have >= want
        if fits:
            return True
    return False


def about() -> str:
    """What the library was built for; "" without one."""
    loaded = _load()[0]
    return "" if loaded is None else str(loaded.hfl_version().decode())


def library() -> ctypes.CDLL:
    """The library; there is one where `reason` says None."""
    loaded = _load()[0]
    assert loaded is not None
    return loaded


def call(name: str, block: ctypes.Structure, *more: Any) -> None:
    """Run an operation.

    Raises:
        RuntimeError: the library refused, and did nothing.
    """
    message = getattr(library(), name)(ctypes.byref(block), *more)
    if message is not None:
        raise RuntimeError(f"{name}: {message.decode()}")


_HOST = torch.device("cpu")


def run(op: str, block: ctypes.Structure, device: torch.device) -> None:
    """Run an operation on the host, or on the stream on which torch works now.

    Raises:
        RuntimeError: as `call`.
    """
    if device == _HOST:
        call(f"hfl_{op}_cpu", block, torch.get_num_threads())
        return
    block.stream = stream(device)
    if device.index == torch.cuda.current_device():
        call(f"hfl_{op}_cuda", block)
        return
    with torch.cuda.device(device):
        call(f"hfl_{op}_cuda", block)


def aligned(x: Tensor) -> bool:
    """True if the first element and every row are at a multiple of 16 bytes."""
    at, size = x.data_ptr(), x.itemsize
    for stride in x.stride()[:-1]:  # a few times as fast as a generator, and asked some hundred times in a call
        at |= stride * size
    return at % 16 == 0


def readable(x: Tensor) -> bool:
    """True if the library can read a tensor as it lies: channels side by side, and on CUDA rows that are aligned."""
    return x.stride(-1) == 1 and (not x.is_cuda or aligned(x))


def reason_on_cuda(x: Tensor, elsewhere: str = "is for CUDA: there it is one launch in place of many") -> str | None:
    """`reason` for an operation that has code for CUDA alone; elsewhere: what to say of tensors on other devices."""
    return reason(x.device) or (None if x.is_cuda else elsewhere)


def laid_out(x: Tensor) -> Tensor:
    """The same values where the library can read them: channels side by side, and on CUDA rows that are aligned."""
    return x if readable(x) else x.clone(memory_format=torch.contiguous_format)


def pointer(x: Tensor | None) -> int | None:
    """Address of the first element."""
    return None if x is None else x.data_ptr()


def bits(x: Tensor | Packed) -> int:
    """Of a packed channel; 0 where none is packed."""
    return 0 if isinstance(x, Tensor) else x.bits


def rows(x: Tensor | Packed) -> HflRows:
    """Keys or values `[B, H, S, D]`."""
    if isinstance(x, Tensor):
        return HflRows(x.data_ptr(), *x.stride()[:3])
    places = (x.scale.data_ptr(), x.zero.data_ptr(), *x.scale.stride()[:2])
    return HflRows(x.payload.data_ptr(), *x.payload.stride()[:3], *places, x.bits)


def stream(device: torch.device) -> int:
    """The stream on which torch works now, without an object for it, which would take as long as a launch."""
    found: int = torch._C._cuda_getCurrentRawStream(device.index)
    return found


_COUNTERS: dict[tuple[torch.device, int], list[Tensor]] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """Zeros `[>= count]`, int32, of a device and its current stream; operations leave them zero.

    Smaller ones from before are kept: a captured graph may still use them. What is made while a graph is captured is
    zero only when that graph runs, so it is of no use to others; a call on the capturing stream before avoids that.
    """
    held = _COUNTERS.setdefault((device, stream(device)), [])
    if held and len(held[-1]) >= count:
        return held[-1]
    made = torch.zeros(max(2 * count, 4096), dtype=torch.int32, device=device)
    if not torch.cuda.is_current_stream_capturing():
        held.append(made)
    return made


def forget_counters(device: torch.device) -> None:
    """Use none of a device's counters again, as an operation that was not carried out may not have left them zero."""
    for key in [key for key in _COUNTERS if key[0] == device]:
        del _COUNTERS[key]
