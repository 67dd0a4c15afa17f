"""Plain causal attention of many queries through FlashAttention 3, where it is installed: `flash_attn_interface`.

FlashAttention 2 (`flash_attn`) is not asked for: torch contains it, and `fused.py` takes it from there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .dispatch import Implementation
from .types import Logits, Packed, Selection, Turns, Visibility

MODULE = "flash_attn_interface"
CAPABILITY = (9, 0)
"""The GPUs that it is faster on than torch's kernels and ours."""
DIMS = (64, 128, 256)
"""Channels that all of its builds have."""
LEAST = 2048
"""Keys from which on a call of it, which takes longer on the host, is worth its while."""


@cache
def _found() -> Callable[..., Any] | str:
    """Its function, or why there is none."""
    if find_spec(MODULE) is None:
        return f"needs {MODULE} (FlashAttention 3), which is not installed"
    try:
        function: Callable[..., Any] = import_module(MODULE).flash_attn_func
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # built for another torch, as a rule
        return f"cannot load {MODULE}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    return function


@cache
def reason(device: torch.device) -> str | None:
    """Why nothing runs on a device, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "is for CUDA devices of sm_90"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        return f"is for CUDA devices of sm_90; this GPU is sm_{capability[0]}{capability[1]}"
    found = _found()
    return found if isinstance(found, str) else None


def missing() -> str | None:
    """Why no operation runs here, or None."""
    here = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return reason(here)


def reject(
    q: Tensor,
    k: Tensor | Packed,
    v: Tensor | Packed,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> str | None:
    """Why it does not take these arguments, or None."""
    without = reason(q.device)
    if without is not None:
        return without
    if selection is not None or turns is not None or not logits.plain:
        return "is asked for all keys, without softcap, learned sinks, ALiBi or lap positions"
    if not isinstance(k, Tensor) or not isinstance(v, Tensor):
        return "reads keys and values as they are"
    tokens, stored = q.shape[2], k.shape[2]
    if not see.aligned or tokens > stored or (see.window is not None and see.window < stored):
        return "is asked for causal attention without padding or windows, whose last query stands at the last key"
    if tokens == 1 or stored < LEAST:
        return f"is asked for more than one query, and for {LEAST} keys or more"
    if q.shape[3] not in DIMS or v.shape[3] != q.shape[3]:
        return f"is asked for {', '.join(map(str, DIMS))} channels, of keys and of values"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float16, torch.bfloat16):
        return "needs queries, keys and values in one dtype, float16 or bfloat16"
    if {k.device, v.device} != {q.device}:
        return "needs queries, keys and values on one device"
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return "leaves gradients to torch"
    return None


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: Logits,
    see: Visibility,
    turns: Turns | None,
    selection: Selection | None = None,
) -> Tensor:
    """`ops.attend_blocks`. Causal means there that the last query stands at the last key, too."""
    attend = _found()
    assert not isinstance(attend, str)
    with torch.cuda.device(q.device):
        out = attend(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=logits.scale, causal=True)
    result: Tensor = out[0] if isinstance(out, tuple) else out  # older ones give the log of sums beside it
    return result.transpose(1, 2)


OPS = {"attend_blocks": Implementation(attend_blocks, reject)}
