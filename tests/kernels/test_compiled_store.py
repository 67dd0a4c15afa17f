"""`append_pages` of the compiled library: bit for bit what is defined, on the CPU and, marked `cuda`, on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import ops
from hf_longctx.kernels.compiled import store
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.ops import Packed

from .built import need

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@dataclass(frozen=True)
class Case:
    """What a call is like; everything else is drawn from `seed`.

    Args:
        pos: positions, one list a row; a single one for all rows.
        sizes: rows, KV heads, slots, channels of a key, channels of a value.
        bits: of stored keys, of stored values; 0: as they are.
        sub: tokens of a sub-block; None: no bounds are kept.
        first: said beside the positions.
    """

    pos: tuple[tuple[int, ...], ...] = ((37,),)
    sizes: tuple[int, int, int, int, int] = (2, 2, 64, 64, 64)
    dtype: torch.dtype = torch.bfloat16
    bits: tuple[int, int] = (0, 0)
    sink: int = 0
    ring: int | None = None
    sub: int | None = None
    first: int | None = None
    seed: int = 0


BASE = Case()
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CASES = [
    *(
        Case(((37,), (9,)), (2, 3, 64, dim, dim), t, (bits, bits), sub=16)
        for dim in (64, 96, 128, 256)
        for t in DTYPES
        for bits in (0, 8, 4)
    ),
    *(Case(((40 - t, *range(41 - t, 40)),), sub=16, bits=(4, 4), seed=t) for t in range(1, 9)),
    replace(BASE, pos=((60, 61, 62, 63), (-1, -1, -1, -1), (0, 1, 2, -1)), sizes=(3, 2, 64, 64, 64), sub=16),
    replace(BASE, pos=((60, 61, 62, 63), (-1, -1, -1, -1), (14, 15, 16, -1)), sizes=(3, 2, 64, 64, 64), bits=(8, 8)),
    replace(BASE, pos=((15, 16, 17), (30, 31, -1)), sub=16, bits=(4, 8)),
    replace(BASE, pos=((3, 4, 5, 6, 7, 8, 9, 10),), sub=1),
    replace(BASE, pos=((3, 4, 5, 6, 7, 8, 9, 10),), sub=3, dtype=torch.float32),
    replace(BASE, pos=((63,), (5,)), sub=64, bits=(8, 8)),
    replace(BASE, pos=((0,),), sub=16),
    replace(BASE, pos=((-1,), (20,)), sub=16),
    replace(BASE, pos=((1000,), (3,)), sink=4, ring=60),
    replace(BASE, pos=((62, 63, 64, 65, 66), (2, 3, 4, 5, -1)), sink=4, ring=60, bits=(4, 4)),
    replace(BASE, pos=((37, 38, 39),), first=37, sub=16, bits=(8, 8)),
    replace(BASE, pos=((62, 63, 64),), first=62, sink=4, ring=60),
    replace(BASE, pos=((37,), (-1,)), sizes=(2, 2, 64, 64, 128), bits=(8, 4), sub=8),
    replace(BASE, sizes=(1, 70, 64, 8, 16), bits=(0, 8), sub=16),
    *(
        Case(((37,), (9,)), (2, 3, 64, dim, dim), t, (bits, bits))
        for dim in (64, 96, 128, 256)
        for t in DTYPES
        for bits in (8, 4)
    ),
    replace(BASE, pos=((60, 61, 62, 63), (-1, -1, -1, -1), (14, 15, 16, -1)), sizes=(3, 2, 64, 128, 64), bits=(4, 4)),
]
OTHERS = [  # which only the CPU takes
    replace(BASE, sizes=(2, 2, 64, 10, 6), bits=(4, 4), sub=16),
    replace(BASE, sizes=(2, 2, 64, 9, 5), bits=(8, 0), sub=16),
    replace(BASE, sizes=(1, 1, 64, 300, 300), dtype=torch.float32, bits=(4, 8), sub=16),
]


def made(case: Case) -> tuple[Any, ...]:
    """Arguments on the CPU; bounds hold what no key is."""
    rows, heads, slots, dim, v_dim = case.sizes
    generator = torch.Generator().manual_seed(case.seed)
    tokens = len(case.pos[0])
    old = [torch.randn(rows, heads, slots, d, generator=generator).to(case.dtype) for d in (dim, v_dim)]
    fresh = [3 * torch.randn(rows, heads, tokens, d, generator=generator).to(case.dtype) for d in (dim, v_dim)]
    stores = [ops.encode_kv(x, bits) if bits else x for x, bits in zip(old, case.bits, strict=True)]
    bounds, sub = None, case.sub or 1
    if case.sub is not None:
        bounds = torch.full((rows, heads, -(-slots // sub), 2, dim), 7.0, dtype=case.dtype)
    return (*stores, *fresh, torch.tensor(case.pos), case.sink, case.ring, bounds, sub, case.first)


def on(device: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the arguments on a device."""
    return tuple(
        replace(x, **{name: getattr(x, name).to(device, copy=True) for name in ("payload", "scale", "zero")})
        if isinstance(x, Packed)
        else x.to(device, copy=True)
        if isinstance(x, Tensor)
        else x
        for x in arguments
    )


def written(arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a call may have changed."""
    tensors = [x for one in arguments[:2] for x in ((one,) if isinstance(one, Tensor) else one.tensors)]
    return [x.cpu() for x in (*tensors, arguments[7]) if x is not None]


def check(case: Case, device: str) -> None:
    need(device)
    arguments = made(case)
    got, expected = on(device, arguments), on("cpu", arguments)
    assert store.reject(*got) is None
    store.append_pages(*got)
    with use_backend("reference"):
        ops.append_pages(*expected)
    for mine, defined, before in zip(written(got), written(expected), written(arguments), strict=True):
        torch.testing.assert_close(mine, defined, atol=0, rtol=0, equal_nan=True)
        assert not torch.equal(mine, before)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(case: Case, device: str) -> None:
    check(case, device)


@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_definition_on_the_cpu(case: Case) -> None:
    check(case, "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_equal_and_of_uneven_values(bits: int, device: str) -> None:
    """Scales at the least number, at the share of the largest value, and ties between two payloads."""
    need(device)
    rows = [
        torch.zeros(64),
        torch.full((64,), -3.0),
        torch.full((64,), 1e-6),
        torch.linspace(1000.0, 1000.5, 64),
        torch.arange(64) / 2,
        torch.tensor([0.0] * 63 + [60000.0]),
    ]
    fresh = torch.stack(rows).view(1, 1, -1, 64)
    arguments = made(Case(pos=(tuple(range(6)),), sizes=(1, 1, 16, 64, 64), dtype=torch.float32, bits=(bits, bits)))
    arguments = (*arguments[:2], fresh, -fresh, *arguments[4:])
    got, expected = on(device, arguments), on("cpu", arguments)
    store.append_pages(*got)
    with use_backend("reference"):
        ops.append_pages(*expected)
    for mine, defined in zip(written(got), written(expected), strict=True):
        torch.testing.assert_close(mine, defined, atol=0, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_stays_in_the_bounds_of_its_block(device: str) -> None:
    need(device)
    arguments = on(device, made(replace(BASE, sub=16)))
    arguments[0][0, 0, 33, 5] = torch.nan
    store.append_pages(*arguments)
    bounds = arguments[7]
    assert bounds[0, 0, 2, :, 5].isnan().all()
    assert int(bounds.isnan().sum()) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_tokens_as_projections_lay_them_out(device: str) -> None:
    """Heads beside each other, channels in steps, and a store that is a part of a larger one."""
    need(device)
    case = replace(BASE, pos=((10, 11),), sub=16)
    arguments = on(device, made(case))
    plain = on(device, arguments)
    store.append_pages(*plain)
    k, v = arguments[2:4]
    apart = torch.zeros(*v.shape[:3], 2 * v.shape[3], dtype=v.dtype, device=device)[..., ::2].copy_(v)
    wide = torch.zeros(2, 3, 64, 64, dtype=k.dtype, device=device)
    wide[:, 1:] = arguments[0]
    store.append_pages(wide[:, 1:], arguments[1], k.transpose(1, 2).contiguous().transpose(1, 2), apart, *arguments[4:])
    assert torch.equal(wide[:, 1:], plain[0])
    assert torch.equal(arguments[1], plain[1])
    assert torch.equal(arguments[7], plain[7])
    assert not wide[:, 0].any()


@pytest.mark.cuda
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_a_captured_call_writes_where_the_text_has_come(bits: int) -> None:
    need("cuda")
    arguments = on("cuda", made(Case(pos=((5,), (9,)), bits=(bits, bits), sub=16)))
    stepped = on("cuda", arguments)
    graph = torch.cuda.CUDAGraph()
    store.append_pages(*on("cuda", arguments))  # whatever is made on the first call is made
    with torch.cuda.graph(graph):
        store.append_pages(*arguments)
    for step in range(20):
        for both in (arguments, stepped):
            both[4].copy_(torch.tensor([[5 + step], [9 + step if step % 3 else -1]]))
            both[2].mul_(-1.01)
        graph.replay()
        store.append_pages(*stepped)
    for mine, one_by_one in zip(written(arguments), written(stepped), strict=True):
        assert torch.equal(mine, one_by_one)


REFUSED: list[tuple[Case, dict[int, Any], str]] = [
    (replace(BASE, pos=(tuple(range(9)),)), {}, "takes at most 8 tokens a row"),
    (replace(BASE, dtype=torch.float64), {}, "needs the store and the tokens in one dtype"),
    (BASE, {2: torch.zeros(2, 2, 1, 64)}, "needs the store and the tokens in one dtype"),
    (BASE, {0: torch.zeros(2, 2, 64, 128, dtype=torch.bfloat16)[..., ::2]}, "needs channels that lie side by side"),
    (replace(BASE, sub=16), {6: 60}, "keeps no bounds of a ring"),
    (replace(BASE, sub=16), {7: torch.zeros(2, 2, 4, 2, 64)}, "needs bounds in the dtype of the keys"),
    (BASE, {2: torch.zeros(0, 2, 1, 64, dtype=torch.bfloat16)}, "takes no empty tensors"),
]


@pytest.mark.parametrize(("case", "changed", "reason"), REFUSED)
def test_what_it_does_not_take(case: Case, changed: dict[int, Any], reason: str) -> None:
    need("cpu")
    arguments = [changed.get(i, x) for i, x in enumerate(made(case))]
    assert reason in str(store.reject(*arguments))


@pytest.mark.cuda
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_what_it_does_not_take_on_cuda(case: Case) -> None:
    need("cuda")
    assert "multiple of 8 channels" in str(store.reject(*on("cuda", made(case))))
