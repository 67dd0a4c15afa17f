"""Weights of experts: rows sorted by them, their products, and what tokens get; by definition, and in the library."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import experts, linear, packing
from hf_longctx.kernels.compiled import experts as compiled
from hf_longctx.kernels.compiled import library
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.experts import PackedExperts, Sorted
from hf_longctx.kernels.linear import Tokens

from .built import need
from .weights import FORMS, moved, random_codes, random_tokens

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
devices = pytest.mark.parametrize("device", DEVICES)
forms = pytest.mark.parametrize("form", FORMS)


def packed(form: str, count: int, rows: int, columns: int) -> PackedExperts:
    """Random weights of some experts."""
    each = [packing.pack(random_codes(form, rows, columns, seed)) for seed in range(count)]

    def together(name: str) -> Any:
        found = [getattr(one, name) for one in each]
        return None if found[0] is None else torch.stack(found)

    return PackedExperts(*(together(name) for name in ("codes", "scale", "shift", "groups")), columns)


def there(x: Any, device: str) -> Any:
    """The same value on a device."""
    fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    return type(x)(**{name: y.to(device) if isinstance(y, Tensor) else y for name, y in fields.items()})


def drawn(rows: int, count: int, seed: int = 0) -> Tensor:
    """Experts of rows, of which one has many and the last none."""
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, max(count - 1, 1), (rows,), generator=made)
    return torch.where(torch.rand(rows, generator=made) < 0.3, 0, ids)


@devices
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (5, 8), (96, 128), (1025, 3), (4096, 512), (5000, 60)])
def test_rows_are_sorted(rows: int, count: int, device: str) -> None:
    need(device)
    ids = drawn(rows, count)
    ids[::7] = torch.tensor([count, -1, 2**40, 0] * rows)[: len(ids[::7])]  # three of them are of no expert
    got = experts.sort_experts(ids.to(device), count)
    known = torch.where((ids >= 0) & (ids < count), ids, count)
    expected = sorted(range(rows), key=lambda row: int(known[row]))
    assert got.order.tolist() == expected
    assert [int(got.places[row]) for row in expected] == list(range(rows))
    assert got.ends.tolist() == [int((known <= expert).sum()) for expert in range(count)]


def one_by_one(tokens: Tokens, weight: PackedExperts, ids: Tensor, times: int, dtype: torch.dtype) -> Tensor:
    """Each row alone, in the rows' own order."""
    out = []
    for row, expert in enumerate(ids.tolist()):
        at = row // times
        own = Tokens(*(x[at : at + 1] for x in (tokens.values, tokens.scale, tokens.sums)))
        with use_backend("reference"):
            out.append(linear.w4a8_linear(own, weight.of(expert), None, dtype))
    return torch.cat(out)


@devices
@forms
@pytest.mark.parametrize("shape", [(1, 2, 5, 72, 96), (9, 3, 5, 200, 384), (16, 2, 3, 64, 1152)])
def test_products_are_those_of_each_row(form: str, shape: tuple[int, ...], device: str) -> None:
    """tokens, rows of each, experts, outputs, inputs."""
    need(device)
    count, times, size, outputs, columns = shape
    if form.startswith("group") and columns % int(form.split()[1]):
        columns = 128
    tokens, weight, ids = (
        random_tokens(count, columns),
        packed(form, size, outputs, columns),
        drawn(count * times, size),
    )
    expected = one_by_one(tokens, weight, ids, times, torch.bfloat16)
    by = experts.sort_experts(ids.to(device), size)
    order = by.order.long()
    with use_backend("compiled"):
        got = experts.w4a8_experts(moved(tokens, device), there(weight, device), by, times, torch.bfloat16)
        assert torch.equal(got.cpu(), expected[order.cpu()])
        spread = Tokens(*(x.to(device)[order // times] for x in (tokens.values, tokens.scale, tokens.sums)))
        again = experts.w4a8_experts(spread, there(weight, device), by, 0, torch.bfloat16)
    assert torch.equal(again, got)
    with use_backend("reference"):
        defined = experts.w4a8_experts(tokens, weight, there(by, "cpu"), times, torch.bfloat16)
    assert torch.equal(defined, got.cpu())


@pytest.mark.cuda
@forms
@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("rows", [2, 18, 30, 130, 500, 1100])
def test_products_of_more_rows(form: str, rows: int, times: int) -> None:
    """Few and many rows for each expert, parts of tiles, rows of no expert, and many experts without any."""
    need("cuda")
    for size, outputs, columns in ((3, 200, 384), (70, 136, 1664 if times else 256)):
        tokens, weight = (
            random_tokens(rows // max(times, 1), columns),
            there(packed(form, size, outputs, columns), "cuda"),
        )
        ids = drawn(rows, size, rows)
        ids[1::5] = size
        by = experts.sort_experts(ids.cuda(), size)
        for dtype in (torch.bfloat16, torch.float16):
            with use_backend("compiled"):
                got = experts.w4a8_experts(moved(tokens, "cuda"), weight, by, times, dtype)
            with use_backend("reference"):
                expected = experts.w4a8_experts(moved(tokens, "cuda"), weight, by, times, dtype)
            end = int(by.ends[-1])
            assert 0 < end < rows
            assert torch.equal(got[:end], expected[:end])


@devices
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_tokens_get_their_rows(weights_dtype: torch.dtype, device: str) -> None:
    need(device)
    made = torch.Generator().manual_seed(0)
    rows, weights = torch.randn(9 * 3, 2056, generator=made).bfloat16(), torch.rand(9, 3, generator=made)
    ids = drawn(27, 4)
    ids[4] = 4
    by = experts.sort_experts(ids.to(device), 4)
    rows[26] = torch.nan  # it is of no expert
    got = experts.combine_experts(rows.to(device), by, weights.to(device, weights_dtype)).cpu()
    places, expected = by.places.tolist(), torch.zeros(9, 2056)
    for token in range(9):
        for i in range(3):
            if ids[3 * token + i] < 4:
                part = rows[places[3 * token + i]].float() * weights[token, i].to(weights_dtype).float()
                expected[token] = expected[token] + part
    assert torch.equal(got, expected.bfloat16())


@pytest.mark.cuda
def test_a_graph_follows_other_experts() -> None:
    """Nothing waits for the device: what was captured holds for other tokens of other experts."""
    need("cuda")
    tokens, weight = moved(random_tokens(4, 256), "cuda"), there(packed("group 128", 6, 192, 256), "cuda")
    ids, weights = torch.zeros(8, dtype=torch.int64, device="cuda"), torch.rand(4, 2, device="cuda")

    def step() -> Tensor:
        by = experts.sort_experts(ids, 6)
        return experts.combine_experts(experts.w4a8_experts(tokens, weight, by, 2, torch.bfloat16), by, weights)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in range(3):
        ids.copy_(drawn(8, 7, seed))
        graph.replay()
        with use_backend("reference"):
            expected = step()
        assert torch.equal(out, expected)


def test_what_does_not_fit() -> None:
    weight, tokens = packed("bytes", 3, 8, 32), random_tokens(4, 32)
    by = experts.sort_experts(torch.tensor([0, 1, 2, 0]), 3)
    with pytest.raises(ValueError, match=r"expected 4 tokens of 32 channels, .* got \[2, 32\]"):
        experts.w4a8_experts(random_tokens(2, 32), weight, by, 0, torch.float32)
    with pytest.raises(ValueError, match="or one for 2 rows each"):
        experts.w4a8_experts(tokens, weight, by, 2, torch.float32)
    other = Sorted(by.order, by.places, by.ends[:2])
    with pytest.raises(ValueError, match="expected rows sorted by 3 experts; got 2"):
        experts.w4a8_experts(tokens, weight, other, 0, torch.float32)
    with pytest.raises(ValueError, match="expected weights of layout"):
        experts.w4a8_experts(tokens, dataclasses.replace(weight, layout=99), by, 0, torch.float32)


GOOD = {"tokens": 4, "rows": 8, "columns": 32, "bits": 8, "dtype": 2, "experts": 3}


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": 0}, "expected float16 or bfloat16"),
        ({"rows": 0}, "expected no empty axis"),
        ({"experts": 513}, "expected 1 to 512 experts"),
        ({"columns": 48}, "expected a multiple of 32 columns"),
        ({"bits": 3}, "expected 4 or 8 bits"),
        ({"group": 64}, "expected groups"),
        ({"times": 3}, "expected rows in multiples"),
    ],
)
def test_the_library_checks_for_itself(change: dict[str, int], message: str) -> None:
    need("cuda")
    said = library.library().hfl_experts_cuda(ctypes.byref(compiled.HflExperts(**{**GOOD, **change})))
    assert message in said.decode()
