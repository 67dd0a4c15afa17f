"""Storing a prompt, and reading packed values back: what is defined; and the library, bit for bit, also on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
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
from .test_compiled_store import DEVICES, on

HEADS = 3


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
        heads: which of the KV heads are stored; None: all.
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
    # nothing is kept but few bits
    *(
        replace(PACKED, sub=None, dims=(dim, dim), dtype=dtype, bits=(bits, bits), heads=(2, 0))
        for dim in (64, 96, 128)
        for dtype in (torch.bfloat16, torch.float16)
        for bits in (8, 4)
    ),
    replace(PACKED, sub=None, bits=(4, 4), reads=False, rows=((37, 100),), slots=192, blank=False),
    replace(RAGGED, sub=None, bits=(4, 4)),
    replace(RAGGED, sub=None, rows=((0, 0), (0, 100))),
    replace(RAGGED, sub=None, bits=(4, 4), dims=(64, 128), rows=((31, 100), (16, 1)), slots=192, blank=False),
]


def made(case: Case, seed: int = 0) -> tuple[ops.GroupFill, dict[str, Any]]:
    """A group, and the other arguments, on the CPU; what nobody writes holds what nobody wrote."""
    generator = torch.Generator().manual_seed(case.tokens + seed)
    kept = HEADS if case.heads is None else len(case.heads)
    old = [torch.randn(2, kept, case.slots, dim, generator=generator).to(case.dtype) for dim in case.dims]
    fresh = [3 * torch.randn(2, HEADS, case.tokens, dim, generator=generator).to(case.dtype) for dim in case.dims]
    fresh[0][:, :, 5], fresh[1][:, :, 7] = 0.0, -3.0  # equal values have a scale of their own
    stores = [ops.encode_kv(x, bits) if bits else x for x, bits in zip(old, case.bits, strict=True)]
    own = torch.arange(case.tokens)
    bounds, sub = None, case.sub or 1
    if case.sub is not None:
        bounds = torch.full((2, kept, -(-case.slots // sub) + 3, 2, case.dims[0]), 7.0, dtype=case.dtype)
    heads = None if case.heads is None else torch.tensor(case.heads, dtype=torch.int32)
    return ops.GroupFill(*stores, case.sink, case.ring, bounds, sub, heads), {
        "k": fresh[0],
        "v": fresh[1],
        "pos": torch.stack([torch.where(own < count, first + own, -1) for first, count in case.rows]),
        "first": case.rows[0][0] if case.even else None,
        "read": tuple(torch.full_like(x, 7.0) for x in fresh) if case.reads else (),
        "blank": case.blank,
    }


def there(device: str, group: ops.GroupFill, more: dict[str, Any]) -> tuple[ops.GroupFill, dict[str, Any]]:
    """Copies on a device."""
    moved = on(device, tuple(vars(group).values()))
    arguments = dict(zip(more, on(device, tuple(more.values())), strict=True))
    arguments["read"] = on(device, more["read"])
    return ops.GroupFill(*moved), arguments


def written(groups: Sequence[ops.GroupFill], more: dict[str, Any]) -> list[Tensor]:
    """What a call may have changed."""
    tensors = [x for group in groups for one in (group.k, group.v) for x in parts(one)]
    return [x.cpu() for x in (*tensors, *(group.bounds for group in groups), *more["read"]) if x is not None]


def values(x: Tensor | Packed) -> Tensor:
    return (x if isinstance(x, Tensor) else ops.decode_kv(x)).clone()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_definition(case: Case) -> None:
    """Token by token, as the words say it."""
    group, more = made(case)
    heads = list(case.heads or range(HEADS))
    with use_backend("reference"):
        before = [values(x) for x in (group.k, group.v)]
        ops.fill_pages([group], **more)
        for i, (store, old) in enumerate(zip((group.k, group.v), before, strict=True)):
            bits, x = case.bits[i], more["v" if i else "k"][:, heads]
            fresh = ops.decode_kv(ops.encode_kv(x, bits)) if bits else x
            expected = torch.zeros_like(old) if case.blank else old
            for row in range(2):
                first, count = case.rows[row % len(case.rows)]
                for t in range(count):
                    beyond = first + t - case.sink
                    slot = case.sink + beyond % case.ring if case.ring and beyond >= 0 else first + t
                    expected[row, :, slot] = fresh[row, :, t]
            assert torch.equal(values(store), expected)
            if case.reads:
                assert torch.equal(more["read"][i][:, heads], fresh)
                assert bool((more["read"][i][:, [head for head in range(HEADS) if head not in heads]] == 7).all())
        if case.sub is not None:
            check_bounds(case, values(group.k), group.bounds)


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


def check(cases: Sequence[Case], device: str) -> None:
    """The library against what is defined, for groups of one call."""
    need(device)
    more = made(cases[0])[1]
    groups = [made(case, seed)[0] for seed, case in enumerate(cases)]
    both = []
    for target in (device, "cpu"):
        mine, arguments = there(target, groups[0], more)
        both.append(([mine, *(there(target, group, more)[0] for group in groups[1:])], arguments))
    (got, arguments), (expected, defined) = both
    assert fill.reject(got, **arguments) is None
    fill.fill_pages(got, **arguments)
    with use_backend("reference"):
        ops.fill_pages(expected, **defined)
    for mine, other in zip(written(got, arguments), written(expected, defined), strict=True):
        torch.testing.assert_close(mine, other, atol=0, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_library(case: Case, device: str) -> None:
    check([case], device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_that_are_hard_to_pack(bits: int, dtype: torch.dtype, device: str) -> None:
    """Of all sizes that there are, far from zero, alike, and with numbers that are none."""
    need(device)
    drawn = torch.Generator().manual_seed(bits)
    sizes = torch.logspace(-40, 38, 79, dtype=torch.float64)
    x = torch.randn(4, 79, 64, generator=drawn, dtype=torch.float64) * sizes[:, None]
    x[1] += sizes[:, None] * 30
    x[2], x[3, :, ::2] = x[2, :, :1], x[3, :, :1]
    x = x.to(dtype)
    beyond = torch.cat((x, x[:, -1:].expand(-1, 4, -1)), 1).clone()
    for token, number in enumerate((float("inf"), -float("inf"), float("nan"), 0.0)):
        beyond[:, 79 + token, 3 * token] = number
    fresh = beyond[None]
    with use_backend("reference"):
        expected = ops.encode_kv(fresh, bits)
        read = ops.decode_kv(expected)
    got, finite = fill.encode_kv(fresh.to(device), bits), fresh.isfinite().all(-1)
    for mine, other in zip(got.tensors, expected.tensors, strict=True):
        assert torch.equal(mine.cpu()[finite], other[finite])
    there = tuple(torch.empty_like(fresh, device=device) for _ in range(2))
    store = ops.encode_kv(torch.zeros_like(fresh), bits)
    group = ops.GroupFill(*on(device, (store, store)), 0, None, None, 1, None)
    pos = torch.arange(fresh.shape[2], device=device)[None]
    fill.fill_pages([group], fresh.to(device), fresh.to(device), pos, 0, there, True)
    for mine in there:
        torch.testing.assert_close(mine.cpu(), read, atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("bits", [0, 8, 4])
def test_groups_of_a_layer(bits: int, even: bool, device: str) -> None:
    """One that keeps all and has bounds, one whose tokens go round, and one that is as large as its ring."""
    base = replace(PACKED if even else RAGGED, bits=(bits, bits), dtype=torch.float16)
    ring = replace(base, sub=None, sink=4, ring=40, slots=44, heads=(1,))
    check([replace(base, heads=(2,)), ring, replace(ring, ring=124, slots=128, heads=(0,))], device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [8, 64, 96, 128, 256])
@pytest.mark.parametrize("bits", [8, 4])
def test_packing_and_reading_back(bits: int, dim: int, dtype: torch.dtype, device: str) -> None:
    need(device)
    made = torch.Generator().manual_seed(dim)
    fresh = 3 * torch.randn(2, 70, 3, dim, generator=made).to(dtype).transpose(1, 2)
    with use_backend("reference"):
        stored = ops.encode_kv(fresh, bits)
        expected = ops.decode_kv(stored)
    (there,) = on(device, (stored,))
    fits = device == "cpu" or dim * bits % 128 == 0
    assert (fill.reject_decode(there) is None) == (fill.reject_encode(fresh.to(device), bits) is None) == fits
    if fits:
        packed = fill.encode_kv(fresh.to(device), bits)
        assert all(torch.equal(x.cpu(), y) for x, y in zip(packed.tensors, stored.tensors, strict=True))
        assert torch.equal(fill.decode_kv(there).cpu(), expected)
        part = replace(there, **{n: getattr(there, n)[:, 1:, 5:60] for n in ("payload", "scale", "zero")})
        assert torch.equal(fill.decode_kv(part).cpu(), expected[:, 1:, 5:60])
