"""What others have for one operation; a result that is not what the operation is defined to give is not timed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .operations import Operation, Size

Call = Callable[[], Any]


@dataclass(frozen=True)
class Rival:
    """Somebody else's kernel.

    Attributes:
        name: in tables and files.
        takes: names of operations.
        prepare: from arguments of the operation, and its size, to a call that gives `[B, Hq, T, D]`.
        needs: the package that it needs, or None.
        cuda: it needs CUDA.
        compiled: torch compiles it: with Triton for CUDA, with a C++ compiler for a CPU.
    """

    name: str
    takes: tuple[str, ...]
    prepare: Callable[[tuple[Any, ...], Size], Call]
    needs: str | None = None
    cuda: bool = False
    compiled: bool = False

    def missing(self, device: torch.device) -> str | None:
        """Why it is absent, or None."""
        if self.needs and find_spec(self.needs) is None:
            return f"needs {self.needs}, which is not installed"
        if self.compiled and device.type == "cuda" and find_spec("triton") is None:
            return "needs triton, which is not installed"
        if self.compiled and device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
            return "needs a C++ compiler"
        return "needs CUDA" if self.cuda and device.type != "cuda" else None


def _sdpa(given: tuple[Any, ...], size: Size) -> Call:
    q, k, v = given[:3]
    causal = q.shape[2] > 1
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)


def _flex(given: tuple[Any, ...], size: Size) -> Call:
    """FlexAttention with a mask of its own; only compiled it skips what the mask leaves out."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, _, see = given[:5]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & ((i - j < see.window) | (j < see.sink)) if see.window else i >= j

    mask = create_block_mask(seen, None, None, q.shape[2], k.shape[2], device=str(q.device))
    compiled: Any = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def _flash_attn(given: tuple[Any, ...], size: Size) -> Call:
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in given[:3])
    return lambda: flash_attn_func(q, k, v, causal=True).transpose(1, 2)


def _flashinfer(given: tuple[Any, ...], size: Size) -> Call:
    import flashinfer

    if size.batch > 1:
        raise NotImplementedError("its calls without a plan take one row")
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in given[:3])
    if q.shape[0] == 1:
        return lambda: flashinfer.single_decode_with_kv_cache(q[0], k, v)[None, :, None]
    return lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True).transpose(0, 1)[None]


RIVALS = (
    Rival("torch sdpa", ("attend", "prefill"), _sdpa),
    Rival("flex attention", ("prefill", "prefill_window"), _flex, compiled=True),
    Rival("flash-attn", ("attend", "prefill"), _flash_attn, "flash_attn", cuda=True),
    Rival("flashinfer", ("attend", "prefill"), _flashinfer, "flashinfer", cuda=True),
)


def rivals_of(one: Operation, size: Size, device: torch.device) -> tuple[list[Rival], list[str]]:
    """Those that do the same, and a line for each that would and is absent."""
    same = [rival for rival in RIVALS if one.name in rival.takes and not size.packed]
    reasons = {rival.name: rival.missing(device) for rival in same}
    absent = [f"{name} is absent: it {reason}." for name, reason in reasons.items() if reason]
    return [rival for rival in same if reasons[rival.name] is None], absent
