"""Operations in Triton against the definition: on the CPU in its interpreter and, marked `cuda`, on a GPU.

Its interpreter knows no products of bfloat16; those are for a GPU alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
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
from . import test_compiled_select as selects
from . import test_compiled_store as stores
from . import test_fill as fills
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


SCORED = [
    *(selects.Scored((2, 2, 3, 2, 40, d), t, r) for d in (16, 40) for t in (F16, F32) for r in (1, 2)),
    *(selects.Scored((2, 2, 3, 3, 40, 16), F16, r, subs=7, blank=20, share=s) for r in (1, 2) for s in selects.SHARES),
    selects.Scored((1, 2, 4, 1, 130, 16), F16, subs=4, blank=130),
    selects.Scored((1, 1, 1, 1, 1, 16), F16, subs=64),
    selects.Scored((1, 1, 20, 2, 33, 16), F32, share="all"),
]


@pytest.mark.parametrize(
    ("case", "device"),
    [(case, "cpu") for case in SCORED]
    + [
        pytest.param(case, "cuda", marks=pytest.mark.cuda)
        for case in (*SCORED, *selects.SCORED)
        if case.sizes[2] * case.sizes[3] < 60  # as many as it takes
    ],
    ids=str,
)
def test_score_pages(case: selects.Scored, device: str) -> None:
    """Errors are at most one rounding of the largest partial sum for every 16 terms, as those of the library."""
    need(device)
    q, summary, subs, share = selects.summaries(case)
    with use_backend("triton"):
        got = ops.score_pages(q.to(device), summary.to(device), subs, share).cpu()
    with use_backend("reference"):
        exact = ops.score_pages(q.double(), summary.double(), subs, share)
        terms = summary.double().abs().amax(3, keepdim=True).nan_to_num(posinf=0.0)
        largest = ops.score_pages(q.double().abs(), terms, subs, "q_head").amax(1, keepdim=True)
    assert got.dtype == torch.float32
    assert got.shape == exact.shape
    assert torch.equal(got.isneginf(), exact.isneginf())
    allowed = max(4, case.vectors * q.shape[3] // 16) * torch.finfo(F32).eps * largest.clamp(min=1e-9)
    assert bool(((got.double() - exact).abs().nan_to_num(nan=0.0) <= allowed).all())
    assert not got.isnan().any()


HERE = [replace(case, dtype=F16) if case.dtype == BF16 else case for case in stores.CASES]


@pytest.mark.parametrize(
    ("case", "device"),
    [(case, "cpu") for case in (*HERE[6:18:2], *HERE[40:46:3], *HERE[46:-1])]
    + [pytest.param(case, "cuda", marks=pytest.mark.cuda) for case in stores.CASES],
    ids=str,
)
def test_append_pages(case: stores.Case, device: str) -> None:
    """Bit for bit what is defined."""
    need(device)
    defined, got = (stores.on(device, stores.made(case)) for _ in range(2))
    with use_backend("reference"):
        ops.append_pages(*defined)
    with use_backend("triton"):
        ops.append_pages(*got)
    assert all(map(torch.equal, stores.written(got), stores.written(defined)))


FILLED = [replace(case, dtype=F16) if case.dtype == BF16 else case for case in fills.CASES]
GROUPS = [
    replace(fills.RAGGED, dtype=F16, sub=16),
    *(replace(fills.RAGGED, dtype=F16, sub=None, sink=4, ring=r, slots=4 + r) for r in (40, 124)),
]


@pytest.mark.parametrize(
    ("cases", "device"),
    [([replace(case, dims=(16, 40))], "cpu") for case in (*FILLED[9:18:2], *FILLED[38:54])]
    + [([replace(case, heads=(head,)) for head, case in enumerate(GROUPS)], "cpu")]
    + [pytest.param([case], "cuda", marks=pytest.mark.cuda) for case in (*fills.CASES[:36:2], *fills.CASES[36:])],
    ids=str,
)
def test_fill_pages(cases: list[fills.Case], device: str) -> None:
    """Bit for bit what is defined, with groups that go through one call."""
    need(device)
    more = fills.made(cases[0])[1]
    both = []
    for name, target in (("triton", device), ("reference", "cpu")):  # a GPU divides by a number of the host otherwise
        groups = [fills.there(target, fills.made(case, seed)[0], more)[0] for seed, case in enumerate(cases)]
        arguments = fills.there(target, groups[0], more)[1]
        with use_backend(name):
            ops.fill_pages(groups, **arguments)
        both.append(fills.written(groups, arguments))
    assert all(map(torch.equal, *both))


@pytest.mark.cuda
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_a_captured_step_reads_as_far_as_the_text_has_come(bits: int) -> None:
    """Nothing waits for the device, and nothing is decided by it while it is recorded."""
    case = decodes.Case((2, 2, 4, 1, 4096, 128), bits=bits or None, ends=(4095, 4095))
    q, k, v, logits, see, _, _ = decodes.made(case, "cuda")
    with use_backend("triton"):
        ops.attend_pages(q, k, v, logits, see, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = ops.attend_pages(q, k, v, logits, see, None)
        for ends in ((10, 4000), (-1, 0), (4095, 1777)):
            see.q_pos.copy_(torch.tensor(ends)[:, None])
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(out, ops.attend_pages(q, k, v, logits, see, None))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("attend_blocks", {"dtype": torch.float64}, "needs queries, keys and values in one dtype"),
    ("attend_blocks", {"dtype": BF16}, "has no bfloat16 in Triton's interpreter"),
    ("attend_blocks", {"sizes": (1, 1, 1, 9, 9, 300)}, "takes at most 256 channels"),
    ("attend_blocks", {"lists": (8, 32, "some")}, "takes blocks of a multiple of 16 keys"),
    ("attend_blocks", {"lists": (32, 8, "some")}, "takes blocks of a multiple of 16 queries"),
    ("attend_blocks", {"lists": None, "sizes": (1, 1, 1, 9, 9, 16)}, "leaves plain causal attention to torch"),
    ("attend_blocks", {"lap": 300}, "cannot turn queries to keys at lap positions"),
    ("attend_pages", {"sizes": (1, 1, 1, 65, 70, 16)}, "takes at most 64 queries a row"),
    ("attend_pages", {"lap": 300, "clamp": 100, "sizes": (1, 1, 1, 9, 90, 16)}, "cannot clamp distances"),
    ("attend_pages", {"sizes": (1, 1, 1, 33, 90, 16)}, "takes a selection for each query, or one for all"),
]


@pytest.mark.parametrize(("op", "options", "reason"), REFUSED)
def test_what_it_does_not_take(op: str, options: dict[str, Any], reason: str) -> None:
    need("cpu")
    arguments = made(replace(LISTS, **options), "cpu")
    with use_backend("triton"), pytest.raises(dispatch.UnsupportedError, match=f"{op}: .*triton: {reason}"):
        getattr(ops, op)(*arguments)


def test_gradients_and_two_formats_are_for_others() -> None:
    need("cpu")
    q, k, v, *rest = made(LISTS, "cpu")
    eight, four = ops.encode_kv(k, 8), ops.encode_kv(v, 4)
    with use_backend("triton"):
        with pytest.raises(dispatch.UnsupportedError, match="triton: needs keys and values in one format"):
            ops.attend_blocks(q, eight, four, *rest)
        with pytest.raises(dispatch.UnsupportedError, match="triton: computes no gradients"):
            ops.attend_blocks(q.requires_grad_(), k, v, *rest)


def test_it_is_loaded_for_a_call_that_it_takes_and_the_interpreter_only_serves_whom_asks() -> None:
    code = (
        "import sys, torch\n"
        "from hf_longctx.kernels import dispatch, ops\n"
        "x = torch.randn(1, 1, 20, 16, dtype=torch.float16)\n"
        "call = lambda: ops.attend_pages(x, x, x, ops.Logits(1.0), ops.Visibility(), None)\n"
        "call(); dispatch.table()\n"
        "assert 'triton' not in sys.modules and dispatch.last_used()['attend_pages'] != 'triton'\n"
        "with dispatch.use_backend('triton'): call()\n"
        "assert 'triton' in sys.modules and dispatch.last_used()['attend_pages'] == 'triton'\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_LONGCTX_BACKEND": "", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"find_spec": lambda name: None}, "needs triton"),
        ({"_interprets": lambda: False}, "runs on CUDA devices; on a CPU in its interpreter only"),
    ],
)
def test_why_it_is_missing(
    changes: dict[str, Callable[..., Any]], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    triton._absent.cache_clear()
    for name, value in changes.items():
        monkeypatch.setattr(triton, name, value)
    with use_backend("triton"):
        assert str(triton.reason(torch.device("cpu"))).startswith(reason)
    triton._absent.cache_clear()


def test_old_gpus_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    triton._too_old.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert triton.reason(torch.device("cuda", 0)) == "needs sm_80 or later; this GPU is sm_75"
    triton._too_old.cache_clear()
