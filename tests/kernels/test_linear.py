"""Quantized linears: tokens, the stored order and the product by definition, in whole numbers."""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from hf_longctx.kernels import linear, ops, packing
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.linear import Codes, PackedWeight

from .weights import FORMS, moved, random_codes, random_tokens

FEW = settings(max_examples=25)
forms = pytest.mark.parametrize("form", FORMS)


def single(x: float) -> float:
    """Rounded to float32."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


@FEW
@given(st.integers(1, 4), st.integers(1, 70), st.integers(0, 99), st.integers(-20, 12), st.sampled_from([0, 1, 2]))
def test_tokens(rows: int, columns: int, seed: int, power: int, kind: int) -> None:
    dtype = (torch.float32, torch.float16, torch.bfloat16)[kind]
    x = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**power).to(dtype)
    with use_backend("reference"):
        got = linear.quantize_tokens(x)
    assert (got.values.dtype, got.scale.dtype, got.sums.dtype) == (torch.int8, torch.float32, torch.int32)
    for i, row in enumerate(x.tolist()):
        most = max(map(abs, row))
        up = single(127 / most) if most else 0.0
        assert got.values[i].tolist() == [min(max(round(single(v * up)), -127), 127) for v in row]
        assert float(got.scale[i]) == single(most / 127)
        assert int(got.sums[i]) == sum(got.values[i].tolist())


def test_tokens_that_are_no_numbers_or_nothing() -> None:
    x = torch.ones(5, 32)
    x[0] = 0
    x[1, 3], x[2, 4], x[3] = math.nan, -math.inf, 2.0**-101
    with use_backend("reference"):
        got = linear.quantize_tokens(x)
    assert (got.values[:4] == 0).all()
    assert (got.values[4] == 127).all()
    assert got.scale.isnan().tolist() == [False, True, True, False, False]
    weight = packing.pack(random_codes("channel", 3, 32))
    out = linear.w4a8_linear(got, weight, None, torch.float32)
    assert out.isnan().all(1).tolist() == [False, True, True, False, False]
    assert (out[[0, 3]] == 0).all()


def test_tokens_out_of_a_norm_and_a_gate() -> None:
    x, up = (torch.randn(3, 64, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (0, 1))
    with use_backend("reference"):
        normed, of_norm = linear.quantize_norm(x, up[0], 1e-5, 1.0, False)
        assert torch.equal(normed, ops.rms_norm(x, up[0], 1e-5, 1.0, False))
        for got, expected in ((of_norm, normed), (linear.quantize_gated(x, up), silu(x) * up)):
            assert expected.dtype == torch.bfloat16
            plain = linear.quantize_tokens(expected)
            assert all(torch.equal(getattr(got, f), getattr(plain, f)) for f in ("values", "scale", "sums"))


def stored(weight: PackedWeight, row: int, column: int) -> int:
    """A code, from the formula of the order."""
    p, w, h, g = row // 64, row // 16 % 4, row // 8 % 2, row % 8
    j, e, t, i = column // 32 % 2, column // 16 % 2, column // 4 % 4, column % 4
    flat = weight.codes.flatten().tolist()
    if weight.bits == 8:
        c = weight.stored_columns // 64 * p + column // 64
        return flat[((((c * 4 + w) * 2) + j) * 32 + 4 * g + t) * 16 + 4 * (2 * e + h) + i] - 128
    c, b = weight.stored_columns // 128 * p + column // 128, column // 64 % 2
    return flat[((((c * 4 + w) * 2) + b) * 32 + 4 * g + t) * 16 + 4 * (2 * j + h) + i] >> 4 * e & 15


@forms
def test_the_stored_order(form: str) -> None:
    codes = random_codes(form, 70, 384)
    weight = packing.pack(codes)
    assert weight.codes.shape == (128, 384 * weight.bits // 8)
    assert weight.group == (int(form.split()[1]) if "group" in form else None)
    flat, made = codes.values.tolist(), torch.Generator().manual_seed(2)
    for row, column in zip(*(torch.randint(0, n, (60,), generator=made).tolist() for n in (70, 384)), strict=True):
        assert stored(weight, row, column) == flat[row][column]
        if weight.groups is not None and weight.group is not None:
            at = (row // 64, column // weight.group, row // 16 % 4 * 16 + row % 8 * 2 + row // 8 % 2)
            scale, zero = weight.groups[at].tolist()
            group = (row, column // weight.group)
            assert (scale, zero - 128) == (int(codes.group_scale[group]), int(codes.group_zero[group]))


@FEW
@given(st.sampled_from(FORMS), st.integers(1, 200), st.integers(1, 6), st.integers(0, 99))
def test_unpacking_undoes_packing(form: str, rows: int, runs: int, seed: int) -> None:
    columns = runs * (int(form.split()[1]) if "group" in form else 32)
    codes = random_codes(form, rows, columns, seed)
    weight = packing.pack(codes)
    assert weight.shape == (rows, columns)
    assert weight.codes.is_contiguous()
    assert weight.codes.shape[0] % 64 == weight.stored_columns % 128 == 0
    back = packing.unpack(weight)
    for field in dataclasses.fields(Codes):
        mine, theirs = getattr(back, field.name), getattr(codes, field.name)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


@forms
def test_what_fills_up_counts_as_zero(form: str) -> None:
    """So a kernel may multiply it with anything that belongs to no column."""
    weight = packing.pack(random_codes(form, 5, 160 if form in ("channel", "bytes", "group 32") else 192 - 64))
    whole = dataclasses.replace(weight, columns=weight.stored_columns, scale=torch.ones(64), shift=None)
    values = packing.unpack(whole)
    assert (packing.int8_values(values)[5:] == 0).all()
    assert (packing.int8_values(values)[:, weight.columns :] == 0).all()


def products(codes: Codes, x: list[list[int]]) -> list[list[int]]:
    """Sums of products, by a literal loop over whole numbers."""
    values = codes.values.tolist()
    if codes.group_scale is not None and codes.group_zero is not None:
        scale, zero, group = codes.group_scale.tolist(), codes.group_zero.tolist(), len(values[0])
        group //= len(scale[0])
        for n, row in enumerate(values):
            for k, code in enumerate(row):
                row[k] = (code * scale[n][k // group] + zero[n][k // group] + 128) % 256 - 128
    return [[sum(a * b for a, b in zip(token, row, strict=True)) for row in values] for token in x]


def expected(codes: Codes, tokens: linear.Tokens, bias: Tensor | None) -> list[list[float]]:
    """The result in float32, each step rounded."""
    scale, shift, scales = (x.tolist() for x in (codes.scale, torch.zeros(1), tokens.scale))
    sums, out = tokens.sums.tolist(), []
    for m, row in enumerate(products(codes, tokens.values.tolist())):
        out.append([single(single(total) * scale[n]) for n, total in enumerate(row)])
        if codes.shift is not None:
            shift = codes.shift.tolist()
            out[m] = [single(y - single(single(sums[m]) * shift[n])) for n, y in enumerate(out[m])]
        out[m] = [single(y * scales[m]) for y in out[m]]
        if bias is not None:
            out[m] = [single(y + b) for y, b in zip(out[m], bias.tolist(), strict=True)]
    return out


@FEW
@given(
    st.sampled_from(FORMS), st.integers(1, 3), st.integers(1, 20), st.integers(1, 3), st.integers(0, 99), st.booleans()
)
def test_products(form: str, rows: int, outputs: int, runs: int, seed: int, biased: bool) -> None:
    columns = runs * (int(form.split()[1]) if "group" in form else 32)
    codes, tokens = random_codes(form, outputs, columns, seed), random_tokens(rows, columns, seed + 1)
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(seed)) if biased else None
    with use_backend("reference"):
        got = linear.w4a8_linear(tokens, packing.pack(codes), bias, torch.float32)
    assert got.tolist() == expected(codes, tokens, bias)


@forms
def test_products_are_those_of_the_weight_that_is_meant(form: str) -> None:
    codes, tokens = random_codes(form, 40, 256), random_tokens(5, 256)
    weight = packing.int8_values(codes).double()
    weight = weight * codes.scale.double()[:, None]
    if codes.shift is not None:
        weight = weight - codes.shift.double()[:, None]
    exact = (tokens.values.double() * tokens.scale.double()[:, None]) @ weight.T
    got = linear.w4a8_linear(tokens, packing.pack(codes), None, torch.float32)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"values": torch.zeros(4, 64)}, r"expected values \[N, K\], uint8 or int8; got torch.float32"),
    ({"values": torch.zeros(4, 48, dtype=torch.uint8)}, "expected columns in multiples of 32"),
    ({"values": torch.full((4, 64), 16, dtype=torch.uint8)}, "expected codes from 0 to 15; got 16"),
    ({"shift": None}, "expected 4 bits with a shift or with groups"),
    ({"values": torch.zeros(4, 64, dtype=torch.int8)}, "or 8 bits with neither"),
    ({"scale": torch.ones(3)}, r"expected a floating-point scale \[4\]"),
    ({"shift": torch.ones(4, dtype=torch.int32)}, r"expected a floating-point shift \[4\]"),
]


@pytest.mark.parametrize(("change", "words"), WRONG)
def test_weights_that_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"pack: .*{words}"):
        packing.pack(dataclasses.replace(random_codes("channel", 4, 64), **change))


WRONG_GROUPS: list[tuple[dict[str, Any], str]] = [
    ({"group_scale": torch.ones(4, 8, dtype=torch.int8)}, r"expected groups, int8, of one of the shapes \[\[4, 4\]"),
    ({"group_zero": torch.zeros(4, 1, dtype=torch.int8)}, r"expected zeros \[4, 4\] as scales"),
    ({"group_scale": -torch.ones(4, 4, dtype=torch.int8)}, "expected group scales of at least 0"),
    ({"group_zero": torch.full((4, 4), 127, dtype=torch.int8)}, "within int8; got more in row 0, group 0"),
]


@pytest.mark.parametrize(("change", "words"), WRONG_GROUPS)
def test_groups_that_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"pack: .*{words}"):
        packing.pack(dataclasses.replace(random_codes("group 32", 4, 128), **change))


def test_products_that_are_refused() -> None:
    weight, tokens = packing.pack(random_codes("channel", 4, 64)), random_tokens(2, 64)
    with pytest.raises(ValueError, match="expected tokens of 64 channels; got 96"):
        linear.w4a8_linear(random_tokens(2, 96), weight, None, torch.float32)
    later = dataclasses.replace(weight, layout=2)
    with pytest.raises(ValueError, match="w4a8_linear: expected a weight of layout 1; got 2"):
        linear.w4a8_linear(tokens, later, None, torch.float32)
    with pytest.raises(ValueError, match="unpack: expected a weight of layout 1; got 2"):
        packing.unpack(later)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@forms
@pytest.mark.parametrize("rows", [1, 17, 40])
def test_products_of_torch_are_those_of_the_definition(form: str, rows: int, device: str) -> None:
    weight, tokens = packing.pack(random_codes(form, 37, 384)), random_tokens(rows, 384)
    there = moved(tokens, device), moved(weight, device), torch.randn(37).to(device)
    with use_backend("torch"):
        got = linear.w4a8_linear(*there, torch.bfloat16)
    with use_backend("reference"):
        assert torch.equal(got, linear.w4a8_linear(*there, torch.bfloat16))


def test_weights_of_several_forms_are_not_one_launch() -> None:
    tokens = random_tokens(2, 64)
    weights = [packing.pack(random_codes(form, 4, 64)) for form in ("channel", "bytes")]
    with pytest.raises(ValueError, match="w4a8_linears: expected weights of one form"):
        linear.w4a8_linears(tokens, weights, [None, None], torch.float32)
    with pytest.raises(ValueError, match=r"w4a8_linears: .* and 1 biases"):
        linear.w4a8_linears(tokens, weights[:1] * 2, [None], torch.float32)
