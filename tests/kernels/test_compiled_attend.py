"""`attend_pages` of the compiled library against the definition, on the CPU and, marked `cuda`, on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import ops
from hf_longctx.kernels.compiled import attend, library
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.ops import Logits, Packed, Selection, Turns, Visibility

from .built import need

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@dataclass(frozen=True)
class Case:
    """What a call is like; everything else is drawn from `seed`.

    Args:
        sizes: rows, KV heads, query heads of each, queries of a row, stored tokens, channels.
        bits: of stored keys and values, or None.
        ends: position of each row's last query, -1 for a row without one; None: the last column.
        ring: columns hold the sinks and a ring, in which the newest tokens have taken the place of older ones.
        chosen: blocks in a selection, and tokens of one.
        share: who shares a selection.
        pages: blocks lie in any order.
        uneven: values of some tokens are thousands of times larger than those of others.
    """

    sizes: tuple[int, int, int, int, int, int] = (2, 2, 4, 1, 150, 128)
    dtype: torch.dtype = torch.bfloat16
    bits: int | None = None
    ends: tuple[int, ...] | None = None
    sink: int = 0
    window: int | None = None
    ring: bool = False
    lap: int | None = None
    softcap: float | None = None
    sink_logits: bool = False
    slopes: bool = False
    chosen: tuple[int, int] | None = None
    share: str = "kv_head"
    pages: bool = False
    uneven: bool = False
    seed: int = 0


BASE = Case()
FORMATS = [(torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, 8), (torch.float16, 8), (torch.bfloat16, 4)]
CASES = [
    *(Case((2, 2, 4, 1, 152, d), t, bits) for d in (64, 96, 128, 256) for t, bits in FORMATS),
    *(Case((2, 2, g, 1, 77, 64), seed=g) for g in (1, 3, 7, 8, 20)),
    *(Case((2, 2, 4, 1, 152, 128), t, bits, uneven=True) for t, bits in FORMATS),
    *(Case((2, 1, 4, t, 200, 64), torch.float16, ends=(198, 40), seed=t) for t in range(2, 9)),
    Case((1, 1, 1, 1, 1, 64)),
    Case((1, 2, 4, 1, 3000, 128)),
    *(Case((2, 1, 4, 1, 3000, d), bits=bits, ends=(2999, 1111), seed=d) for d in (96, 128, 256) for bits in (4, 8)),
    *(Case((1, 1, g, 1, 504, 128), bits=4, seed=g) for g in (1, 7, 8, 20)),
    *(replace(BASE, sizes=(2, 2, 4, 1, 152, 128), ends=(151, 60), window=w, bits=b) for w, b in ((150, 4), (33, 8))),
    *(replace(BASE, sizes=(2, 2, 4, t, 408, 128), ends=(400, 399), softcap=2.0, bits=4) for t in (1, 3)),
    Case((1, 1, 4, 1, 5000, 64), bits=4, ends=(4321,)),
    replace(BASE, sizes=(3, 2, 4, 1, 1000, 128), ends=(-1, 0, 700)),
    replace(BASE, sizes=(3, 2, 4, 3, 1000, 64), ends=(-1, 1, 999), bits=8),
    replace(BASE, sizes=(2, 2, 4, 2, 600, 64), ends=(599, 100), sink=5, window=40),
    replace(BASE, sizes=(2, 2, 4, 2, 600, 64), ends=(599, 10), sink=70, window=40, bits=4),
    replace(BASE, sizes=(2, 2, 4, 1, 600, 64), ends=(50, 599), window=1),
    replace(BASE, sizes=(2, 2, 4, 1, 83, 64), ring=True, sink=4, window=79, ends=(200, 60)),
    replace(BASE, sizes=(3, 2, 4, 4, 83, 96), ring=True, sink=4, window=70, ends=(200, 60, -1)),
    replace(BASE, sizes=(2, 2, 4, 1, 88, 64), ring=True, sink=4, window=80, lap=90, ends=(500, 30)),
    replace(BASE, sizes=(2, 2, 4, 5, 88, 128), ring=True, sink=4, window=80, lap=84, ends=(420, 85), bits=8),
    replace(BASE, sizes=(2, 2, 4, 1, 88, 256), ring=True, window=88, lap=90, ends=(91, 30), dtype=torch.float16),
    replace(BASE, softcap=2.0),
    replace(BASE, softcap=2.0, dtype=torch.float16, bits=8, sizes=(2, 2, 4, 1, 152, 64)),
    replace(BASE, sink_logits=True, ends=(149, 30)),
    replace(BASE, sink_logits=True, ends=(149, -1), dtype=torch.float16),
    replace(BASE, slopes=True, sizes=(2, 2, 3, 2, 150, 64), ends=(149, 30)),
    *(
        Case((2, 2, 4, 1, 512, 128), t, bits, chosen=(9, 16), share=share, pages=pages, ends=(500, 200))
        for t, bits in FORMATS
        for share, pages in (("kv_head", True), ("q_head", False), ("all", True))
    ),
    Case((2, 2, 4, 3, 512, 64), chosen=(6, 32), share="q_head", pages=True, ends=(511, 100)),
    Case((2, 2, 20, 3, 500, 64), chosen=(20, 5), pages=True, ends=(499, -1)),
    Case((1, 1, 4, 1, 4096, 128), chosen=(128, 16), ends=(4000,)),
    Case((2, 2, 4, 2, 256, 64), bits=4, chosen=(7, 8), pages=True, sink_logits=True, softcap=3.0, ends=(255, 80)),
    Case((2, 2, 4, 2, 256, 64), chosen=(7, 8), pages=True, lap=300, ends=(255, 80)),
]
OTHERS = [  # which only the CPU takes
    Case((2, 2, 4, 2, 60, 40), torch.float32, ends=(59, 20)),
    Case((2, 2, 4, 2, 60, 64), torch.float32, sink=3, window=9, softcap=1.0, sink_logits=True),
    Case((2, 2, 4, 1, 61, 10), torch.float32, chosen=(4, 5), pages=True, ends=(60, 30)),
]


def made(case: Case, device: str) -> tuple[Any, ...]:
    """Arguments: columns that no query sees hold NaN."""
    rows, kv_heads, group, tokens, stored, dim = case.sizes
    generator = torch.Generator().manual_seed(case.seed)
    q, k, v = (
        torch.randn(rows, heads, n, dim, generator=generator).to(case.dtype)
        for heads, n in ((kv_heads * group, tokens), (kv_heads, stored), (kv_heads, stored))
    )
    if case.uneven:
        v = v * 2.0 ** torch.randint(-8, 5, (rows, kv_heads, stored, 1), generator=generator).to(case.dtype)
    q_pos = None if case.ends is None else _ends(case.ends, tokens)
    k_pos = _ring(case) if case.ring else None
    logits = Logits(
        dim**-0.5,
        case.softcap,
        torch.randn(kv_heads * group, generator=generator).to(case.dtype) if case.sink_logits else None,
        torch.rand(kv_heads * group, generator=generator) / 8 if case.slopes else None,
    )
    see = Visibility(case.sink, case.window, q_pos, k_pos)
    turns, selection = None, None
    if case.lap is not None:
        frequencies = 0.5 ** torch.arange(0, 8, 8 / (dim // 2))
        assert q_pos is not None
        turns = Turns(q_pos.clamp(max=stored - 1), case.lap, case.sink, frequencies)
    if case.chosen is not None:
        selection = _selection(case, generator)
    stores: list[Tensor | Packed] = [x if case.bits is None else ops.encode_kv(x, case.bits) for x in (k, v)]
    if q_pos is not None and k_pos is None and selection is None:
        last = max(0, int(q_pos.max()) + 1)
        for x in stores:
            (x if isinstance(x, Tensor) else x.scale)[:, :, last:] = torch.nan
    return _on(device, q, *stores, logits, see, turns, selection)


def _on(device: str, *values: Any) -> tuple[Any, ...]:
    """The same arguments on a device."""
    moved = []
    for x in values:
        if isinstance(x, Tensor):
            moved.append(x.to(device))
        elif x is None:
            moved.append(None)
        else:
            fields = {name: y.to(device) for name, y in vars(x).items() if isinstance(y, Tensor)}
            moved.append(replace(x, **fields))
    return tuple(moved)


def _ends(ends: tuple[int, ...], tokens: int) -> Tensor:
    """Positions of queries: the last of each row, and those before it, -1 before the text."""
    last = torch.tensor(ends)[:, None]
    return (last - torch.arange(tokens - 1, -1, -1)).clamp(min=-1)


def _ring(case: Case) -> Tensor:
    assert case.ends is not None
    k_pos = torch.full((len(case.ends), case.sizes[4]), -1)
    for row, end in enumerate(case.ends):
        for pos in range(end + 1):
            k_pos[row, pos if pos < case.sink else case.sink + (pos - case.sink) % (case.sizes[4] - case.sink)] = pos
    return k_pos


def _selection(case: Case, generator: torch.Generator) -> Selection:
    rows, kv_heads, group, tokens, stored, _ = case.sizes
    assert case.chosen is not None
    chosen, block = case.chosen
    shape = (rows, {"all": 1, "kv_head": kv_heads, "q_head": kv_heads * group}[case.share], tokens, chosen)
    ids = torch.full(shape, -1, dtype=torch.int32)
    pages = ids.clone()
    for line, places in zip(ids.view(-1, chosen), pages.view(-1, chosen), strict=True):
        blocks = -(-stored // block)
        filled = min(int(torch.randint(chosen // 2, chosen + 1, (), generator=generator)), blocks)
        line[:filled] = torch.randperm(blocks, generator=generator)[:filled].sort().values
        places[:filled] = torch.randperm(blocks, generator=generator)[:filled]
    return Selection(ids, block, 1, pages if case.pages else None)


def values(x: Tensor | Packed) -> Tensor:
    return x if isinstance(x, Tensor) else ops.decode_kv(x)


def compiled(monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...]) -> Tensor:
    """The library's result; whatever it does not write is NaN."""
    need(arguments[0].device)
    assert attend.reject(*arguments) is None
    monkeypatch.setattr(
        attend, "empty_out", lambda q, n: q.new_full((q.shape[0], q.shape[2], q.shape[1], n), torch.nan).transpose(1, 2)
    )
    out = attend.attend_pages(*arguments)
    assert torch.equal(out, attend.attend_pages(*arguments))
    return out


def check(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are at most twice those of the definition in the same dtype, and 2 ulp."""
    arguments = made(case, device)
    q, k, v = (values(x) for x in arguments[:3])
    k, v = k.nan_to_num(), v.nan_to_num()  # of what nobody sees
    with use_backend("reference"):
        exact = ops.attend_pages(q.double(), k.double(), v.double(), *arguments[3:])
        same = ops.attend_pages(q, k, v, *arguments[3:])
    got = compiled(monkeypatch, arguments)
    assert got.dtype == case.dtype
    ulp = torch.finfo(case.dtype).eps * float(exact.abs().max())
    yardstick = float((same.double() - exact).abs().max())
    assert float((got.double() - exact).abs().max()) <= 2 * yardstick + 2 * ulp
    blind = exact.eq(0).all(-1)
    assert not got[blind].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, device, monkeypatch)


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_definition_on_the_cpu(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, "cpu", monkeypatch)


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"sizes": (1, 1, 4, 9, 64, 64)}, "takes at most 8 queries a row"),
    ({"dtype": torch.float64}, "needs queries, keys and values in one dtype, float32, float16 or bfloat16"),
    ({"slopes": True, "lap": 100, "ends": (63,)}, "has no ALiBi at lap positions"),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("options", "reason"), REJECTED)
def test_what_it_does_not_take(
    options: dict[str, Any], reason: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "reason", lambda device: None)
    case = replace(Case((1, 1, 4, 1, 64, 64)), **options)
    assert attend.reject(*made(case, device)) == reason


def test_gradients_and_clamped_distances_are_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "reason", lambda device: None)
    q, k, v, logits, see, _, _ = made(Case((1, 1, 4, 1, 64, 64)), "cpu")
    assert attend.reject(q.requires_grad_(), k, v, logits, see, None) == "computes no gradients"
    with torch.no_grad():
        assert attend.reject(q, k, v, logits, see, None) is None
        turns = Turns(torch.zeros(1, 1, dtype=torch.int64), 100, 0, clamp=9)
        assert attend.reject(q, k, v, logits, see, turns) == "cannot clamp distances on a CPU"
        several = Selection(torch.zeros(1, 1, 2, 1, dtype=torch.int32), 16, 2)
        assert attend.reject(q, k, v, logits, see, None, several) == "takes a selection for each query, or one for all"


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "has no float32 on CUDA"),
        ({"sizes": (1, 1, 4, 1, 64, 80)}, "takes 64, 96, 128, 256 channels, of keys and of values, on CUDA"),
        ({"sizes": (1, 1, 4, 1, 63, 64), "bits": 8}, "needs rows that begin at multiples of 16 bytes"),
        ({"bits": 4, "chosen": (4, 4)}, "needs blocks of a multiple of 8 tokens where keys are packed"),
    ],
)
def test_what_it_does_not_take_on_cuda(options: dict[str, Any], reason: str) -> None:
    need("cuda")
    assert attend.reject(*made(replace(Case((1, 1, 4, 1, 64, 64)), **options), "cuda")) == reason


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_rows_that_do_not_follow_on_each_other(bits: int, device: str) -> None:
    need(torch.device(device))
    q, k, v, logits, see, _, _ = made(Case((2, 2, 4, 1, 1000, 128), bits=bits, ends=(999, 500)), device)
    apart = []
    for x in (k, v):
        payload = x.payload.repeat_interleave(2, 2)[:, :, ::2]
        assert payload.stride(2) == 2 * x.payload.stride(2)
        apart.append(replace(x, payload=payload))
    assert torch.equal(
        attend.attend_pages(q, *apart, logits, see, None), attend.attend_pages(q, k, v, logits, see, None)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("size", [2.0**-120, 2.0**-20, 2.0**60])
def test_queries_of_any_size_over_packed_keys(size: float, bits: int, device: str) -> None:
    need(torch.device(device))
    q, k, v, logits, see, _, _ = made(Case((1, 2, 4, 1, 200, 64), bits=bits), device)
    q[:, ::2] *= size
    logits = replace(logits, scale=logits.scale / max(size, 1.0))
    with use_backend("reference"):
        exact = ops.attend_pages(q.double(), values(k).double(), values(v).double(), logits, see, None)
    ulp = torch.finfo(q.dtype).eps * float(exact.abs().max())
    assert float((attend.attend_pages(q, k, v, logits, see, None).double() - exact).abs().max()) <= 3 * ulp


@pytest.mark.cuda
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("bits", [8, 4])
def test_queries_that_are_not_finite_are_no_numbers_and_harm_no_others(bits: int, number: float) -> None:
    need("cuda")
    q, k, v, logits, see, _, _ = made(Case((1, 2, 4, 1, 200, 64), bits=bits), "cuda")
    out = attend.attend_pages(q, k, v, logits, see, None)
    q[0, 3, 0, 17] = number
    wrong = attend.attend_pages(q, k, v, logits, see, None)
    assert wrong[0, 3].isnan().all()
    wrong[0, 3] = out[0, 3]
    assert torch.equal(wrong, out)


@pytest.mark.cuda
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_a_captured_call_reads_as_far_as_the_text_has_come(bits: int | None) -> None:
    need("cuda")
    q, k, v, logits, see, _, _ = made(Case((2, 2, 4, 1, 4096, 128), bits=bits, ends=(4095, 4095)), "cuda")
    attend.attend_pages(q, k, v, logits, see, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend.attend_pages(q, k, v, logits, see, None)
    for ends in ((10, 4000), (-1, 0), (4095, 1777)):
        see.q_pos.copy_(torch.tensor(ends)[:, None])
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, attend.attend_pages(q, k, v, logits, see, None))
        with use_backend("reference"):
            exact = ops.attend_pages(*(values(x).double() for x in (q, k, v)), logits, see, None)
        ulp = torch.finfo(q.dtype).eps * float(exact.abs().max())
        assert float((out.double() - exact).abs().max()) <= 3 * ulp
