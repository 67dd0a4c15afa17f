"""`attend_blocks` of the compiled library against the definition, on a GPU (marker `cuda`); what it does not take."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import dispatch, ops
from hf_longctx.kernels.compiled import library, prefill
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.ops import Logits, Selection, Turns, Visibility

from .built import need


@dataclass(frozen=True)
class Case:
    """What a call is like; everything else is drawn from `seed`.

    Args:
        sizes: rows, KV heads, query heads of each, queries of a row, stored tokens, channels.
        ends: position of each row's last query, -1 for a row without one; None: the last column.
        lists: tokens of a block of keys, of a block of queries, and how many blocks are chosen: `some`, `all`, `one`
            or `own`, the last that a query can see.
        share: who shares a selection.
        pages: blocks lie in any order.
        loud: logits are so many times as large.
    """

    sizes: tuple[int, int, int, int, int, int] = (1, 2, 2, 300, 300, 128)
    dtype: torch.dtype = torch.bfloat16
    ends: tuple[int, ...] | None = None
    sink: int = 0
    window: int | None = None
    softcap: float | None = None
    sink_logits: bool = False
    slopes: bool = False
    lists: tuple[int, int, str] | None = None
    share: str = "q_head"
    pages: bool = False
    loud: float = 1.0
    seed: int = 0


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
]


def made(case: Case, device: str) -> tuple[Any, ...]:
    """Arguments: columns after the last query of every row hold NaN."""
    rows, kv_heads, group, tokens, stored, dim = case.sizes
    generator = torch.Generator().manual_seed(case.seed)
    q, k, v = (
        torch.randn(rows, n, heads, dim, generator=generator).to(case.dtype).transpose(1, 2)
        for heads, n in ((kv_heads * group, tokens), (kv_heads, stored), (kv_heads, stored))
    )
    q_pos = None
    if case.ends is not None:
        last = torch.tensor(case.ends)[:, None]
        q_pos = (last - torch.arange(tokens - 1, -1, -1)).clamp(min=-1)
        if not case.pages:
            k[:, :, max(case.ends) + 1 :] = torch.nan
            v[:, :, max(case.ends) + 1 :] = torch.nan
    logits = Logits(
        case.loud * dim**-0.5,
        case.softcap,
        torch.randn(kv_heads * group, generator=generator).to(case.dtype) if case.sink_logits else None,
        torch.rand(kv_heads * group, generator=generator) / 8 if case.slopes else None,
    )
    selection = None if case.lists is None else _selection(case, q_pos, generator, device)
    logits = replace(logits, **{n: x.to(device) for n, x in vars(logits).items() if isinstance(x, Tensor)})
    see = Visibility(case.sink, case.window, None if q_pos is None else q_pos.to(device))
    return *(x.to(device) for x in (q, k, v)), logits, see, None, selection


def _selection(case: Case, q_pos: Tensor | None, generator: torch.Generator, device: str) -> Selection:
    """Lists that reach beyond the queries, some of them empty; a block that is chosen need not be seen."""
    rows, kv_heads, group, tokens, stored, _ = case.sizes
    assert case.lists is not None
    block, q_block, kind = case.lists
    heads = {"all": 1, "kv_head": kv_heads, "q_head": kv_heads * group}[case.share]
    count, blocks = -(-tokens // q_block), -(-stored // block)
    places = torch.arange(stored - tokens, stored) if q_pos is None else q_pos.amax(0)
    ids = torch.full((rows, heads, count, blocks), -1, dtype=torch.int32)
    pages = ids.clone()
    for at in torch.cartesian_prod(*(torch.arange(n) for n in (rows, heads, count))).reshape(-1, 3).tolist():
        own = int(places[: (at[2] + 1) * q_block].max()) // block
        filled = {"some": int(torch.randint(0, blocks + 1, (), generator=generator)), "all": blocks}.get(kind, 1)
        chosen = torch.randperm(blocks, generator=generator)[:filled].sort().values
        ids[(*at, slice(filled))] = torch.tensor([own]) if kind == "own" else chosen.int()
        pages[(*at, slice(filled))] = torch.randperm(blocks, generator=generator)[:filled].int()
    return Selection(ids.to(device), block, q_block, pages.to(device) if case.pages else None)


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


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are at most twice those of the definition in the same dtype, and 2 ulp.

    `attend_pages` has the same definition, and none of its shortcuts for rows that end where the columns do.
    """
    need("cuda")
    arguments = made(case, "cuda")
    q, k, v = arguments[0], *(x.nan_to_num() for x in arguments[1:3])
    with use_backend("reference"):
        exact = ops.attend_pages(q.double(), k.double(), v.double(), *arguments[3:])
        same = ops.attend_pages(q, k, v, *arguments[3:])
    got = compiled(monkeypatch, arguments)
    assert got.dtype == case.dtype
    ulp = torch.finfo(case.dtype).eps * float(exact.abs().max())
    yardstick = float((same.double() - exact).abs().max())
    assert float((got.double() - exact).abs().max()) <= 2 * yardstick + 2 * ulp
    assert not got[exact.eq(0).all(-1)].any()


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


@pytest.mark.cuda
def test_it_is_what_runs_and_plain_causal_attention_is_not() -> None:
    need("cuda")
    q, k, v, logits, see, _, selection = made(LISTS, "cuda")
    ops.attend_blocks(q, k, v, logits, see, None, selection)
    assert dispatch.last_used()["attend_blocks"] == "compiled"
    ops.attend_blocks(q, k, v, logits, see, None)
    assert dispatch.last_used()["attend_blocks"] == "torch"


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
]


@pytest.mark.parametrize(("options", "reason"), REJECTED)
def test_what_it_does_not_take(options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "reason", lambda device: None)
    q, *rest = made(replace(LISTS, **options), "cpu")
    assert prefill.reject(q, *rest) == "has many queries a row on CUDA only"
    assert prefill.reject(q.as_subclass(OnCuda), *rest) == reason


def test_turned_packed_and_other_columns_are_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "reason", lambda device: None)
    q, k, v, logits, see, _, selection = made(LISTS, "cpu")
    q = q.as_subclass(OnCuda)
    assert prefill.reject(q, k, v, logits, see, None, selection) is None
    assert prefill.reject(q, k, v, logits, Visibility(0, 100), None) is None
    turns = Turns(torch.zeros(1, 1, dtype=torch.int64), 100, 0, torch.ones(4))
    assert prefill.reject(q, k, v, logits, see, turns, selection) == "cannot turn many queries to keys at lap positions"
    packed = ops.encode_kv(k, 8)
    reason = "takes no packed keys and values of many queries"
    assert prefill.reject(q, packed, packed, logits, see, None, selection) == reason
    elsewhere = Visibility(k_pos=torch.arange(300)[None])
    assert prefill.reject(q, k, v, logits, elsewhere, None) == "needs columns that are positions"
    assert prefill.reject(q.requires_grad_(), k, v, logits, see, None, selection) == "computes no gradients"
    with torch.no_grad():
        assert prefill.reject(q, k, v, logits, see, None, selection) is None
