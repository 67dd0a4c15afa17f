"""Operations in Triton against the definition: on the CPU in its interpreter and, marked `cuda`, on a GPU.

Its interpreter knows no products of bfloat16; those are for a GPU alone.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import dispatch, ops, triton
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.ops import Packed

from . import test_compiled_attend as decodes
from . import test_compiled_prefill as prefills
from .prefills import Case, made

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]

SMALL = Case((2, 1, 2, 40, 70, 16), F16)
LISTS = Case((1, 1, 2, 70, 100, 16), F16, lists=(32, 32, "some"))
PREFILLS = [
    *(replace(SMALL, sizes=(1, 1, 2, 40, 70, d), dtype=t) for d in (10, 16, 40, 64) for t in (F16, F32)),
    *(replace(LISTS, sizes=(1, 1, 2, 40, 70, d), dtype=t) for d in (40, 64) for t in (F16, F32)),
    *(replace(LISTS, sizes=(1, 2, g, 40, 70, 16), seed=g) for g in (1, 3)),
    *(replace(LISTS, lists=(32, 32, kind)) for kind in ("all", "one", "own")),
    *(replace(LISTS, lists=(block, q_block, "some")) for block in (16, 48) for q_block in (16, 96)),
    *(replace(LISTS, share=share, pages=True, sizes=(1, 2, 2, 40, 139, 16)) for share in ("all", "kv_head")),
    replace(LISTS, ends=(99, 41), sizes=(2, 1, 2, 60, 100, 16)),
    replace(LISTS, ends=(-1, 99, 70), sizes=(3, 1, 1, 65, 100, 16)),
    replace(LISTS, sizes=(1, 1, 2, 1, 100, 16), lists=(16, 1, "some")),
    replace(LISTS, softcap=3.0, sink_logits=True, slopes=True),
    replace(LISTS, softcap=3.0, dtype=F32),
    Case((1, 1, 1, 200, 200, 16), F16, window=40),
    Case((1, 1, 1, 200, 230, 16), F16, sink=4, window=70),
    Case((1, 1, 1, 150, 250, 16), F32, sink=70, window=1),
    Case((1, 1, 1, 200, 200, 16), F16, sink=100, window=120, sink_logits=True),
    Case((2, 1, 1, 100, 250, 16), F16, sink=4, window=60, ends=(249, 120)),
    Case((2, 1, 1, 100, 250, 16), F16, sink=4, window=60, ends=(-1, 101), slopes=True),
    *(replace(SMALL, bits=b, dtype=t) for b, t in ((8, F16), (4, F16), (8, F32), (4, F32))),
    *(replace(LISTS, bits=b, pages=True) for b in (8, 4)),
    replace(SMALL, bits=4, window=30, sink=4, ends=(69, 50)),
    *(
        Case((3, 1, g, 40, 0, 16), F16, sink=4, window=50, ring=((0, 40), (300, 29), (30, 0)), **more)
        for g, more in ((1, {}), (2, {"bits": 4}))
    ),
]
LARGE = [case for case in prefills.CASES if not case.lap]

STEPS = [
    *(decodes.Case((1, 2, 3, 1, 100, d), t, bits) for d in (16, 40) for t in (F16, F32) for bits in (None, 8, 4)),
    *(decodes.Case((2, 1, g, 1, 77, 16), F16, seed=g) for g in (1, 7, 20)),
    *(decodes.Case((2, 1, 4, t, 200, 16), F16, ends=(198, 40), seed=t) for t in (2, 5, 8)),
    decodes.Case((1, 1, 1, 1, 1, 16), F16),
    decodes.Case((3, 1, 4, 3, 400, 16), F16, ends=(-1, 1, 399), bits=8),
    decodes.Case((2, 1, 4, 2, 400, 16), F16, ends=(399, 100), sink=5, window=40),
    decodes.Case((2, 1, 4, 2, 300, 16), F16, ends=(299, 10), sink=70, window=40, bits=4),
    decodes.Case((2, 2, 4, 1, 200, 16), F16, ends=(50, 199), window=1),
    decodes.Case((3, 1, 4, 4, 83, 16), F16, ring=True, sink=4, window=70, ends=(200, 60, -1)),
    decodes.Case((2, 2, 4, 1, 88, 16), F16, ring=True, sink=4, window=80, lap=90, ends=(500, 30)),
    decodes.Case((2, 1, 4, 5, 88, 16), F16, ring=True, sink=4, window=80, lap=84, ends=(420, 85), bits=8),
    decodes.Case((2, 1, 3, 2, 150, 16), F16, softcap=2.0, slopes=True, sink_logits=True, ends=(149, -1)),
    *(
        decodes.Case((2, 2, 2, 1, 200, 16), F16, b, chosen=(9, 16), share=share, pages=pages, ends=(190, 80))
        for b, share, pages in ((None, "kv_head", True), (8, "q_head", False), (4, "all", True))
    ),
    decodes.Case((1, 1, 2, 3, 100, 16), F32, chosen=(9, 5), share="q_head", pages=True, ends=(99,)),
    decodes.Case((2, 1, 20, 2, 100, 16), F16, chosen=(9, 5), pages=True, ends=(99, -1), sink_logits=True),
]


def need(device: str) -> None:
    """Skip on a CPU whose Triton compiles for a GPU beside it."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton's interpreter is off: TRITON_INTERPRET=1")
    with use_backend("triton"):
        assert triton.reason(torch.device(device)) is None


def nan_filled(q: Tensor, width: int) -> Tensor:
    return q.new_full((q.shape[0], q.shape[2], q.shape[1], width), torch.nan).transpose(1, 2)


def finite(x: Tensor | Packed) -> Tensor | Packed:
    return x.nan_to_num() if isinstance(x, Tensor) else replace(x, scale=x.scale.nan_to_num())


def exactly(x: Tensor | Packed) -> Tensor | Packed:
    return x.double() if isinstance(x, Tensor) else replace(x, dtype=torch.float64)


def check(op: str, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are at most twice those of the definition in the same dtype, and 2 ulp; what is not written is NaN."""
    q, k, v = arguments[0], *map(finite, arguments[1:3])
    with use_backend("reference"):
        exact = ops.attend_pages(*map(exactly, (q, k, v)), *arguments[3:])
        same = ops.attend_pages(q, k, v, *arguments[3:])
    with use_backend("triton"):
        dispatch.chosen(op, *arguments)
        monkeypatch.setattr(triton._module(op), "empty_out", nan_filled)
        got = getattr(ops, op)(*arguments)
        assert not q.is_cuda or torch.equal(got, getattr(ops, op)(*arguments))
    assert dispatch.last_used()[op] == "triton"
    assert got.dtype == q.dtype
    ulp = torch.finfo(q.dtype).eps * float(exact.abs().max())
    yardstick = float((same.double() - exact).abs().max())
    assert float((got.double() - exact).abs().max()) <= 2 * yardstick + 2 * ulp
    assert not got[exact.eq(0).all(-1)].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", PREFILLS, ids=str)
def test_attend_blocks(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need(device)
    check("attend_blocks", made(case, device), monkeypatch)


@pytest.mark.cuda
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_attend_blocks_of_whole_tiles(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check("attend_blocks", made(case, "cuda"), monkeypatch)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", STEPS, ids=str)
def test_attend_pages(case: decodes.Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need(device)
    check("attend_pages", decodes.made(case, device), monkeypatch)


@pytest.mark.cuda
@pytest.mark.parametrize("case", decodes.CASES, ids=str)
def test_attend_pages_of_whole_tiles(case: decodes.Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check("attend_pages", decodes.made(case, "cuda"), monkeypatch)
