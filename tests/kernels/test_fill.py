"""Storing a prompt, and reading packed values back: what is defined, and, bit for bit, the library on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import ops
from hf_longctx.kernels.compiled import fill
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.types import Packed, parts

from .built import need
from .test_compiled_store import on


@dataclass(frozen=True)
class Case:
    """What a call is like; everything else is drawn.

    Args:
        rows: first position and number of tokens of each row; a single one for all rows.
        tokens: columns of the call.
        slots: of the store.
        bits: of stored keys, of stored values; 0: as they are.
        sub: tokens of a sub-block; None: no bounds are kept.
        even: `first` is said.
        heads: which of the three KV heads are stored; None: all.
        reads: what is read is asked for.
        blank: the store holds nothing.
    """

    rows: tuple[tuple[int, int], ...] = ((0, 100),)
    tokens: int = 100
    slots: int = 128
    dims: tuple[int, int] = (64, 64)
    dtype: torch.dtype = torch.bfloat16
    bits: tuple[int, int] = (0, 0)
    sink: int = 0
    ring: int | None = None
    sub: int | None = None
    even: bool = True
    heads: tuple[int, ...] | None = None
    reads: bool = False
    blank: bool = True


PACKED = Case(bits=(8, 8), sub=16, reads=True)
RAGGED = replace(PACKED, rows=((0, 100), (0, 17)), even=False)
CASES = [
    *(
        Case(dims=(dim, dim), dtype=dtype, bits=(bits, bits), sub=16, reads=True, heads=(2, 0))
        for dim in (64, 96, 128, 256)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for bits in (0, 8, 4)
    ),
    *(replace(PACKED, sub=sub, bits=(4, 8)) for sub in (1, 3, 64, 100, 128)),
    replace(PACKED, rows=((37, 100),), slots=192, blank=False),
    replace(PACKED, rows=((37, 100),), slots=192, blank=False, sub=7, dims=(64, 128)),
    RAGGED,
    replace(RAGGED, rows=((0, 0), (0, 100)), bits=(4, 4)),
    replace(RAGGED, rows=((31, 100), (16, 1)), slots=192, blank=False),
    replace(RAGGED, rows=((31, 99), (16, 0)), slots=192, blank=False, sub=5, bits=(0, 0)),
    *(replace(PACKED, sub=None, sink=4, ring=ring, slots=min(4 + ring, 128)) for ring in (20, 60, 96, 124)),
    replace(PACKED, sub=None, sink=4, ring=60, slots=64, rows=((50, 100),), blank=False),
    replace(RAGGED, sub=None, sink=4, ring=20, slots=24, rows=((0, 100), (0, 13))),
    replace(RAGGED, sub=None, sink=4, ring=60, slots=64, rows=((500, 100), (3, 70)), blank=False),
    replace(RAGGED, tokens=700, rows=((0, 700), (0, 301)), slots=768, heads=(1,)),
    replace(PACKED, tokens=1000, rows=((0, 1000),), slots=1088, bits=(4, 4), dims=(128, 128)),
]


def made(case: Case) -> tuple[Any, ...]:
    """Arguments on the CPU; what nobody writes holds what nobody wrote."""
    generator = torch.Generator().manual_seed(case.tokens)
    kept = 3 if case.heads is None else len(case.heads)
    old = [torch.randn(2, kept, case.slots, dim, generator=generator).to(case.dtype) for dim in case.dims]
    fresh = [3 * torch.randn(2, 3, case.tokens, dim, generator=generator).to(case.dtype) for dim in case.dims]
    fresh[0][:, :, 5], fresh[1][:, :, 7] = 0.0, -3.0  # equal values have a scale of their own
    stores = [ops.encode_kv(x, bits) if bits else x for x, bits in zip(old, case.bits, strict=True)]
    own = torch.arange(case.tokens)
    pos = torch.stack([torch.where(own < count, first + own, -1) for first, count in case.rows])
    bounds, sub = None, case.sub or 1
    if case.sub is not None:
        bounds = torch.full((2, kept, -(-case.slots // sub) + 3, 2, case.dims[0]), 7.0, dtype=case.dtype)
    heads = None if case.heads is None else torch.tensor(case.heads, dtype=torch.int32)
    read = tuple(torch.full_like(x, 7.0) for x in fresh) if case.reads else None
    first = case.rows[0][0] if case.even else None
    return (*stores, *fresh, pos, case.sink, case.ring, bounds, sub, first, heads, read, case.blank)


def there(device: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the arguments on a device."""
    read = arguments[11]
    moved = read if read is None else tuple(x.to(device, copy=True) for x in read)
    return (*on(device, arguments[:11]), moved, arguments[12])


def written(arguments: tuple[Any, ...]) -> list[Tensor]:
    """What a call may have changed."""
    tensors = [x for one in arguments[:2] for x in parts(one)]
    return [x.cpu() for x in (*tensors, arguments[7], *(arguments[11] or ())) if x is not None]


def values(x: Tensor | Packed) -> Tensor:
    return x if isinstance(x, Tensor) else ops.decode_kv(x)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(case: Case) -> None:
    """Token by token, as the words say it."""
    arguments = made(case)
    before = on("cpu", arguments[:2])
    heads = case.heads or (0, 1, 2)
    with use_backend("reference"):
        ops.fill_pages(*arguments)
        fresh = [
            x[:, list(heads)] if not bits else ops.decode_kv(ops.encode_kv(x, bits))[:, list(heads)]
            for x, bits in zip(arguments[2:4], case.bits, strict=True)
        ]
        for i, (store, old) in enumerate(zip(arguments[:2], before, strict=True)):
            expected = torch.zeros_like(values(old)) if case.blank else values(old)
            for row in range(2):
                first, count = case.rows[row % len(case.rows)]
                for t in range(count):
                    beyond = first + t - case.sink
                    slot = case.sink + beyond % case.ring if case.ring and beyond >= 0 else first + t
                    expected[row, :, slot] = fresh[i][row, :, t]
            assert torch.equal(values(store), expected)
            if case.reads:
                assert torch.equal(arguments[11][i][:, list(heads)], fresh[i])
                others = [head for head in range(3) if head not in heads]
                assert bool((arguments[11][i][:, others] == 7).all())
        if case.sub is not None:
            check_bounds(case, values(arguments[0]), arguments[7])


def check_bounds(case: Case, keys: Tensor, bounds: Tensor) -> None:
    assert case.sub is not None
    for row in range(2):
        first, count = case.rows[row % len(case.rows)]
        for entry in range(bounds.shape[2]):
            start, stop = entry * case.sub, min((entry + 1) * case.sub, first + count)
            if count and start < first + count and stop > first:
                part = keys[row, :, start:stop]
                expected = torch.stack((part.amin(1), part.amax(1)), 1)
            else:
                none = torch.tensor([float("inf"), float("-inf")] if case.blank else [7.0, 7.0])
                expected = none[:, None].expand(bounds.shape[1], 2, bounds.shape[4]).to(bounds.dtype)
            assert torch.equal(bounds[row, :, entry], expected)


@pytest.mark.cuda
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_library_on_a_gpu(case: Case) -> None:
    need("cuda")
    arguments = made(case)
    got, expected = there("cuda", arguments), there("cpu", arguments)
    assert fill.reject(*got) is None
    fill.fill_pages(*got)
    with use_backend("reference"):
        ops.fill_pages(*expected)
    for mine, defined in zip(written(got), written(expected), strict=True):
        torch.testing.assert_close(mine, defined, atol=0, rtol=0)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [8, 64, 96, 128, 256])
@pytest.mark.parametrize("bits", [8, 4])
def test_reading_back_on_a_gpu(bits: int, dim: int, dtype: torch.dtype) -> None:
    need("cuda")
    made = torch.Generator().manual_seed(dim)
    stored = ops.encode_kv(3 * torch.randn(2, 3, 70, dim, generator=made).to(dtype), bits)
    with use_backend("reference"):
        expected = ops.decode_kv(stored)
    (there,) = on("cuda", (stored,))
    assert (fill.reject_decode(there) is None) == (dim * bits % 128 == 0)
    if dim * bits % 128 == 0:
        assert torch.equal(fill.decode_kv(there).cpu(), expected)
        part = replace(there, **{n: getattr(there, n)[:, 1:, 5:60] for n in ("payload", "scale", "zero")})
        assert torch.equal(fill.decode_kv(part).cpu(), expected[:, 1:, 5:60])
