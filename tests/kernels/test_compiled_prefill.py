"""`attend_blocks` of the compiled library against the definition, on a GPU (marker `cuda`); what it does not take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import dispatch, ops
from hf_longctx.kernels.compiled import library, prefill
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.ops import Logits, Packed, Visibility

from .built import need
from .prefills import Case, made

BF16, F16 = torch.bfloat16, torch.float16
LISTS = Case(lists=(128, 128, "some"))
CASES = [
    *(Case((2, 2, 2, 200, 333, d), t) for d in (64, 96, 128, 256) for t in (BF16, F16)),
    *(Case((2, 2, 2, 300, 300, d), t, lists=(128, 128, "some")) for d in (64, 96, 128, 256) for t in (BF16, F16)),
    *(replace(LISTS, sizes=(1, 2, g, 300, 900, 64), seed=g) for g in (1, 3, 4, 7)),
    *(replace(LISTS, lists=(128, 128, kind)) for kind in ("all", "one", "own")),
    *(replace(LISTS, lists=(block, q_block, "some")) for block in (64, 192, 256) for q_block in (128, 512)),
    *(replace(LISTS, share=share, pages=True, sizes=(2, 2, 3, 300, 1111, 128)) for share in ("all", "kv_head")),
    replace(LISTS, ends=(299, 41), sizes=(2, 2, 2, 200, 300, 128)),
    replace(LISTS, ends=(-1, 299, 130), sizes=(3, 2, 2, 257, 300, 64)),
    replace(LISTS, sizes=(1, 1, 4, 1, 1000, 128)),
    replace(LISTS, sizes=(1, 1, 1, 129, 129, 128)),
    replace(LISTS, sizes=(1, 1, 4, 640, 5000, 128)),
    replace(LISTS, softcap=3.0, sink_logits=True, slopes=True),
    Case((1, 1, 4, 1, 500, 128)),
    *(Case((2, 2, 2, 300, 1700, d), t, ends=(1699, 500)) for d, t in ((128, BF16), (64, F16))),
    replace(LISTS, lists=(64, 128, "all"), sizes=(1, 1, 2, 200, 1900, 128)),
    Case((1, 2, 2, 700, 700, 128), window=100),
    Case((1, 2, 2, 700, 700, 64), F16, sink=4, window=129),
    Case((1, 2, 2, 700, 900, 128), sink=128, window=256),
    Case((1, 2, 2, 700, 900, 256), sink=70, window=64),
    Case((1, 2, 2, 700, 900, 96), sink=300, window=1),
    Case((2, 2, 2, 300, 700, 128), sink=4, window=200, ends=(699, 150)),
    Case((2, 2, 2, 300, 700, 64), sink=4, window=200, ends=(-1, 310)),
    Case((2, 2, 2, 200, 400, 128), ends=(399, 20), sink_logits=True),
    *(Case((1, 4, 8, 1500, 1700, d), t, sink=sink, window=300) for d, t, sink in ((128, BF16, 0), (64, F16, 140))),
    *(replace(LISTS, sizes=(2, 4, 4, 1300, 2000, d), ends=(1999, 700), share="kv_head") for d in (64, 128)),
    *(replace(LISTS, loud=12.0, dtype=t, sizes=(1, 2, 4, 400, 3000, d)) for d in (64, 128, 256) for t in (BF16, F16)),
    replace(LISTS, sizes=(3, 4, 4, 1000, 1100, 128), ends=(1099, -1, 999), lists=(256, 256, "some"), pages=True),
    Case((2, 2, 2, 200, 400, 128), F16, ends=(399, 20), slopes=True, softcap=2.0),
    *(Case((2, 2, 1, 200, 333, d), t, bits=b) for d in (64, 96, 128, 256) for t, b in ((BF16, 8), (F16, 4))),
    *(replace(LISTS, sizes=(1, 2, 4, 300, 900, d), bits=b, pages=True) for d in (64, 128) for b in (4, 8)),
    Case((2, 2, 2, 300, 300, 128), bits=4, window=100, ends=(299, 150), sink=4),
    *(Case((1, 1, g, 300, 300, 128), sink=4, window=100, lap=100, seed=g) for g in (1, 4, 7)),
    *(Case((1, 2, 1, 300, 700, d), F16, sink=70, window=90, lap=130, rotated=32) for d in (64, 96, 128, 256)),
    Case((1, 2, 1, 300, 700, 128), sink=4, window=300, lap=300, rotated=128, interleaved=True),
    Case((1, 2, 1, 300, 700, 128), window=200, lap=200, bits=8),
    Case((1, 2, 1, 300, 700, 64), sink=100, window=200, lap=250, rotated=0),
    Case((1, 2, 1, 300, 700, 64), sink=100, window=200, lap=250, softcap=3.0),
    Case((2, 1, 2, 300, 700, 128), lap=120, clamp=100, ends=(699, 400)),
    Case((1, 1, 2, 300, 700, 128), lap=120, clamp=100, rotated=0),
    *(
        replace(LISTS, sizes=(2, 1, 2, 640, 2000, d), lap=390, clamp=300, pages=True, bits=b, share="all")
        for d in (64, 128, 256)
        for b in (0, 8)
    ),
    replace(LISTS, sizes=(1, 1, 4, 300, 2000, 128), lists=(128, 300, "some"), lap=513, clamp=512, interleaved=True),
    replace(LISTS, sizes=(2, 1, 4, 256, 1500, 128), ends=(-1, 1100), lap=2000, bits=4, sink_logits=True),
    *(
        Case((3, 2, g, 200, 0, d), t, sink=4, window=150, ring=((0, 200), (700, 99), (90, 0)), **more)
        for g, d, t in ((1, 128, BF16), (4, 64, F16), (7, 96, BF16), (1, 256, BF16))
        for more in ({}, {"lap": 160}, {"lap": 160, "bits": 8}, {"bits": 4})
    ),
    Case((1, 1, 2, 130, 0, 128), sink=128, window=256, ring=((1000, 130),), lap=256),
    Case((2, 1, 2, 130, 0, 128), sink=0, window=64, ring=((3000, 130), (2, 64)), lap=64),
    Case((2, 1, 2, 130, 0, 64), window=700, ring=((3000, 130), (2, 64)), lap=101, clamp=100),
]


def compiled(monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...]) -> Tensor:
    """The library's result, the same twice; whatever it does not write is NaN."""
    monkeypatch.setattr(
        prefill,
        "empty_out",
        lambda q, n: q.new_full((q.shape[0], q.shape[2], q.shape[1], n), torch.nan).transpose(1, 2),
    )
    assert prefill.reject(*arguments) is None
    out = prefill.attend_blocks(*arguments)
    assert torch.equal(out, prefill.attend_blocks(*arguments))
    return out


def _finite(x: Tensor | Packed) -> Tensor | Packed:
    return x.nan_to_num() if isinstance(x, Tensor) else replace(x, scale=x.scale.nan_to_num())


def _exactly(x: Tensor | Packed) -> Tensor | Packed:
    return x.double() if isinstance(x, Tensor) else replace(x, dtype=torch.float64)


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are at most twice those of the definition in the same dtype, and 2 ulp.

    `attend_pages` has the same definition, and none of its shortcuts for rows that end where the columns do.
    """
    need("cuda")
    arguments = made(case, "cuda")
    q, k, v = arguments[0], *map(_finite, arguments[1:3])
    with use_backend("reference"):
        exact = ops.attend_pages(*map(_exactly, (q, k, v)), *arguments[3:])
        same = ops.attend_pages(q, k, v, *arguments[3:])
    got = compiled(monkeypatch, arguments)
    assert got.dtype == case.dtype
    ulp = torch.finfo(case.dtype).eps * float(exact.abs().max())
    yardstick = float((same.double() - exact).abs().max())
    assert float((got.double() - exact).abs().max()) <= 2 * yardstick + 2 * ulp
    assert not got[exact.eq(0).all(-1)].any()


@pytest.mark.cuda
@pytest.mark.parametrize("bits", [0, 8])
@pytest.mark.parametrize("tokens", [1, 5])
def test_decode_steps_with_clamped_distances_are_read_by_it(tokens: int, bits: int) -> None:
    need("cuda")
    case = replace(LISTS, sizes=(2, 2, 3, tokens, 1500, 64), lists=(128, tokens, "some"), lap=390, clamp=300, bits=bits)
    arguments = made(replace(case, ends=(1499, 700)), "cuda")
    q, k, v = arguments[0], *map(_finite, arguments[1:3])
    with use_backend("reference"):
        exact = ops.attend_pages(*map(_exactly, (q, k, v)), *arguments[3:])
        same = ops.attend_pages(q, k, v, *arguments[3:])
    got = ops.attend_pages(*arguments)
    assert dispatch.last_used()["attend_pages"] == "compiled"
    ulp = torch.finfo(case.dtype).eps * float(exact.abs().max())
    yardstick = float((same.double() - exact).abs().max())
    assert float((got.double() - exact).abs().max()) <= 2 * yardstick + 2 * ulp


@pytest.mark.cuda
def test_a_long_text_is_what_the_definition_says_at_its_last_queries() -> None:
    need("cuda")
    k, v = torch.randn(2, 1, 2, 1 << 17, 128, dtype=BF16, device="cuda")
    q = torch.randn(1, 8, 256, 128, dtype=BF16, device="cuda")
    see, logits = Visibility(), Logits(128**-0.5)
    got = prefill.attend_blocks(q, k, v, logits, see, None)
    with use_backend("reference"):
        exact = ops.attend_blocks(q[:, :, -8:].float(), k.float(), v.float(), logits, see, None)
    assert float((got[:, :, -8:] - exact).abs().max()) <= 3 * torch.finfo(BF16).eps * float(exact.abs().max())


HEADS = [
    *(Case((2, 2, 2, 200, 333, d), sink=4, window=99) for d in (64, 96, 128, 256)),
    *(Case((1, 2, 2, 300, 900, d), F16, lists=(128, 128, "some"), share="q_head") for d in (64, 128)),
    Case((1, 2, 2, 300, 900, 128), sink_logits=True, bits=8),
    Case((1, 1, 2, 300, 700, 128), lap=120, clamp=100),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("case", HEADS, ids=str)
def test_some_heads_of_a_layer(case: Case, device: str) -> None:
    """Those of the call are picked out of all queries and put among all results; the others stay as they are."""
    if device == "cuda":
        need(device)
    else:  # where torch is held back, its attention has no 16 bits
        case = replace(case, dtype=torch.float32)
    q, *arguments = made(case, device)
    rows, heads, tokens, dim = q.shape
    own = torch.tensor([2 * heads - 1 - 2 * i for i in range(heads)], device=device, dtype=torch.int32)
    every = torch.full((rows, tokens, 2 * heads, dim), torch.nan, dtype=q.dtype, device=device).transpose(1, 2)
    every[:, own.long()] = q
    out = torch.full_like(every, 7.0)
    assert ops.attend_heads(every, *arguments, own, out) is None
    assert dispatch.last_used()["attend_heads"] == ("compiled" if device == "cuda" else "reference")
    assert torch.equal(out[:, own.long()], ops.attend_blocks(q, *arguments))
    others = [head for head in range(2 * heads) if head not in own.tolist()]
    assert bool((out[:, others] == 7.0).all())


@pytest.mark.cuda
def test_it_is_what_runs_and_plain_causal_attention_is_not() -> None:
    need("cuda")
    q, k, v, logits, see, _, selection = made(LISTS, "cuda")
    ops.attend_blocks(q, k, v, logits, see, None, selection)
    assert dispatch.last_used()["attend_blocks"] == "compiled"
    ops.attend_blocks(q, k, v, logits, see, None)
    assert dispatch.last_used()["attend_blocks"] == "torch"


@pytest.mark.cuda
@pytest.mark.parametrize("more", [-1, 0, 77])
def test_some_heads_of_a_causal_text_are_read_where_they_lie_on_sm_90(more: int) -> None:
    need("cuda")
    tokens = prefill.LONG_OF_SOME + more
    q, k, v, logits, see, *_ = made(Case((1, 2, 4, tokens, tokens, prefill.WIDE)), "cuda")
    own = torch.arange(8, device="cuda", dtype=torch.int32)
    out = torch.full_like(q, torch.nan)
    ops.attend_heads(q, k, v, logits, see, None, None, own, out)
    here = more >= 0 and torch.cuda.get_device_capability() == (9, 0)
    assert dispatch.last_used()["attend_heads"] == ("compiled" if here else "reference")
    expected = (prefill if here else ops).attend_blocks(q, k, v, logits, see, None)
    assert torch.equal(out, expected)


@pytest.mark.cuda
def test_a_long_causal_text_is_read_by_it_on_sm_90() -> None:
    need("cuda")
    q, k, v, logits, see, *_ = made(Case((1, 2, 2, prefill.LONG + 9, prefill.LONG + 9, prefill.WIDE)), "cuda")
    got = ops.attend_blocks(q, k, v, logits, see, None)
    here = torch.cuda.get_device_capability() == (9, 0)  # elsewhere torch is faster
    assert dispatch.last_used()["attend_blocks"] == ("compiled" if here else "torch")
    rows = torch.cat((torch.arange(70), torch.arange(999, 1069), torch.arange(q.shape[2] - 70, q.shape[2]))).cuda()
    arguments = (logits, Visibility(q_pos=rows[None]), None)
    with use_backend("reference"):
        exact = ops.attend_pages(*(x.double() for x in (q[:, :, rows], k, v)), *arguments)
        same = ops.attend_pages(q[:, :, rows], k, v, *arguments)
    ulp = torch.finfo(q.dtype).eps * float(exact.abs().max())
    yardstick = float((same.double() - exact).abs().max())
    assert float((got[:, :, rows].double() - exact).abs().max()) <= 2 * yardstick + 2 * ulp


class OnCuda(Tensor):
    """A tensor of the host that says that it lies on a GPU."""

    is_cuda = True  # type: ignore[assignment]


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": torch.float32}, "needs queries, keys and values in one dtype, float16 or bfloat16"),
    ({"sizes": (1, 1, 1, 9, 9, 80)}, "takes 64, 96, 128, 256 channels, of keys and of values"),
    ({"lists": (96, 128, "some")}, "takes blocks of a multiple of 64 keys"),
    ({"lists": (64, 64, "some")}, "takes blocks of a multiple of 128 queries"),
    ({"lists": None}, "leaves plain causal attention to torch"),
    ({"lists": None, "window": 300}, "leaves plain causal attention to torch"),
    ({"lists": None, "bits": 8}, "leaves plain causal attention to torch"),
    ({"lap": 300, "rotated": 24}, "turns pairs of channels in multiples of 8"),
    ({"lap": 300, "slopes": True}, "has no ALiBi at lap positions"),
]
TAKEN: list[dict[str, Any]] = [
    {},
    {"bits": 4},
    {"lap": 300},
    {"lap": 300, "rotated": 0},
    {"lists": None, "window": 100},
    {"lists": None, "lap": 300, "clamp": 100, "bits": 8},
    {"lists": None, "window": 100, "ring": ((900, 300),)},
    {"sizes": (1, 1, 1, 300, 300, 128), "lists": (64, 300, "some")},
]


@pytest.mark.parametrize(("options", "reason"), [*REJECTED, *((options, None) for options in TAKEN)])
def test_what_it_does_not_take(options: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "reason", lambda device: None)
    q, *rest = made(replace(LISTS, **options), "cpu")
    assert prefill.reject(q, *rest) == "has many queries a row on CUDA only"
    assert prefill.reject(q.as_subclass(OnCuda), *rest) == reason


@pytest.mark.parametrize(
    ("tokens", "stored", "dim", "tiles", "reason"),
    [
        (2048, 2048, 128, True, None),
        (2047, 2047, 128, True, "leaves plain causal attention to torch"),
        (8192, 8192, 64, True, "leaves plain causal attention to torch"),
        (8192, 8192, 128, False, "leaves plain causal attention to torch"),
        (8, 9, 64, False, None),
    ],
)
def test_which_causal_texts_it_takes(
    tokens: int, stored: int, dim: int, tiles: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of whole ones those that were measured to be faster; queries that follow keys always."""
    monkeypatch.setattr(library, "reason", lambda device: None)
    monkeypatch.setattr(prefill, "_has_tiles", lambda device: tiles)
    q, *rest = made(Case((1, 1, 1, tokens, stored, dim)), "cpu")
    assert prefill.reject(q.as_subclass(OnCuda), *rest) == reason


def test_keys_and_values_in_two_formats_and_gradients_are_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "reason", lambda device: None)
    q, k, v, *rest = made(LISTS, "cpu")
    q = q.as_subclass(OnCuda)
    assert prefill.reject(q, ops.encode_kv(k, 8), v, *rest) == "needs keys and values in one format"
    assert prefill.reject(q, ops.encode_kv(k, 8), ops.encode_kv(v, 4), *rest) == "needs keys and values in one format"
    assert prefill.reject(q.requires_grad_(), k, v, *rest) == "computes no gradients"
    with torch.no_grad():
        assert prefill.reject(q, k, v, *rest) is None
