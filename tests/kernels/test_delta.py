"""One-bit deltas: words written out by hand, the definition as a loop, isolation of rows, gradients, and refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_longctx.kernels.delta import delta_linear
from hf_longctx.kernels.dispatch import use_backend

from .deltas import Case, literal, make

CASES = [
    Case(1, 64, 5, 1, 1),
    Case(5, 96, 37, 3, 3, by_row=True),
    Case(16, 256, 70, 16, 2, planes=2),
    Case(40, 128, 33, 2, 1, planes=3, by_row=True),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_words_written_out_by_hand() -> None:
    """Bit b of word w is the sign of input 32 w + b, the lowest bit first; bit 31 makes the word negative."""
    bits = torch.tensor([[[0b1011, -(2**31)], [-1, 0]]], dtype=torch.int32)  # [1, 2, 2]
    scales = torch.tensor([[[0.5], [2.0]]])  # [1, 2, 1]
    x, base = torch.eye(64), torch.zeros(64, 2)
    out = delta_linear(x, base, bits, scales, torch.zeros(64, dtype=torch.int32))
    plus = [0, 1, 3, 63]
    first = torch.full((64,), -0.5).index_fill(0, torch.tensor(plus), 0.5)
    second = torch.cat([torch.full((32,), 2.0), torch.full((32,), -2.0)])
    assert torch.equal(out, torch.stack([first, second], 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_what_it_is(case: Case, dtype: torch.dtype) -> None:
    x, base, bits, scales, slots = make(case, dtype)
    out = delta_linear(x, base, bits, scales, slots)
    assert out.dtype == dtype
    want = literal(x, base, bits, scales, slots)
    near = 2 * case.inputs * torch.finfo(torch.float32).eps
    torch.testing.assert_close(out.double(), want, rtol=torch.finfo(dtype).eps, atol=near)


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_any_shape_in_float64(rows: int, groups: int, out: int, slots: int, planes: int, by_row: bool) -> None:
    case = Case(rows, 32 * groups * 2, out, slots, groups, planes, by_row)
    given_ = make(case, torch.float64, seed=rows + out)
    torch.testing.assert_close(delta_linear(*given_), literal(*given_), rtol=1e-12, atol=1e-12)


def test_rows_without_a_slot_keep_their_base() -> None:
    x, base, bits, scales, _ = make(CASES[1], torch.bfloat16)
    x[2] = torch.nan
    assert torch.equal(delta_linear(x, base, bits, scales, torch.full((5,), -1, dtype=torch.int32)), base)
    assert delta_linear(x[:0], base[:0], bits, scales, torch.empty(0, dtype=torch.int32)).shape == (0, 37)


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_beside_any_others(dtype: torch.dtype, backend: str | None) -> None:
    case = Case(23, 1536, 150, 3, 3, planes=2, by_row=True)
    x, base, bits, scales, slots = make(case, dtype)

    def run(rows: Tensor) -> Tensor:
        if backend is None:
            return delta_linear(x[rows], base[rows], bits, scales, slots[rows])
        with use_backend(backend):
            return delta_linear(x[rows], base[rows], bits, scales, slots[rows])

    whole = run(torch.arange(23))
    made = torch.Generator().manual_seed(1)
    for count in (1, 2, 17, 23):
        rows = torch.randperm(23, generator=made)[:count]
        assert torch.equal(run(rows), whole[rows])
    x[7], base[3] = torch.nan, torch.inf
    others = torch.tensor([row for row in range(23) if row not in (3, 7)])
    assert torch.equal(run(torch.arange(23))[others], whole[others])


@pytest.mark.parametrize("case", [Case(6, 64, 5, 3, 2, planes=2, by_row=True), Case(6, 64, 5, 3, 1)])
def test_gradients(case: Case) -> None:
    x, base, bits, scales, slots = make(case, torch.float64)
    for tensor in (x, base, scales):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *some: delta_linear(some[0], some[1], bits, some[2], slots), (x, base, scales)
    )
    delta_linear(x.detach(), base.detach(), bits, scales, slots).sum().backward()  # of scales alone
    assert scales.grad is not None
    assert (x.grad, base.grad) == (None, None)


def test_gradients_in_bfloat16_are_those_of_the_unpacked_weights() -> None:
    x, base, bits, scales, slots = make(Case(8, 128, 40, 2, 1), torch.bfloat16)
    x.requires_grad_(), scales.requires_grad_()
    above = torch.randn(8, 40).bfloat16()
    (got_x, got_scales) = torch.autograd.grad(delta_linear(x, base, bits, scales, slots), (x, scales), above)
    wide = [x.detach().double().requires_grad_(), scales.detach().double().requires_grad_()]
    want_x, want_scales = torch.autograd.grad(literal(wide[0], base, bits, wide[1], slots), wide, above.double())
    assert (got_x.dtype, got_scales.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(got_x.double(), want_x, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(got_scales.double(), want_scales, rtol=1e-5, atol=1e-5)


REFUSED = [
    ({"bits": torch.zeros(2, 5, 2)}, TypeError, "expected bits of torch.int32; got torch.float32"),
    ({"slot_of_row": torch.zeros(3, dtype=torch.int64)}, TypeError, "expected slot_of_row of torch.int32"),
    ({"scales": torch.ones(2, 5, 1).double()}, TypeError, "scales of torch.float32"),
    ({"x": torch.ones(3, 64, dtype=torch.int32)}, TypeError, "x and base_out in floating point"),
    ({"x": torch.ones(4, 64)}, ValueError, r"x \[R, K\] and base_out \[R, N\]; got \[4, 64\] and \[3, 5\]"),
    ({"x": torch.ones(3, 48)}, ValueError, r"expected bits \[S, 5, 48 / 32\]; got \[2, 5, 2\]"),
    ({"base_out": torch.ones(3, 6)}, ValueError, r"expected bits \[S, 6, 64 / 32\]"),
    ({"scales": torch.ones(1, 5, 1)}, ValueError, r"expected scales \[2, 5 or 1, groups"),
    ({"scales": torch.ones(2, 5, 3)}, ValueError, "of a multiple of 32 inputs each"),
    ({"scales": torch.ones(2, 5, 0)}, ValueError, "of a multiple of 32 inputs each"),
    ({"slot_of_row": torch.zeros(2, dtype=torch.int32)}, ValueError, r"expected slot_of_row \[3\]"),
    ({"slot_of_row": torch.tensor([0, 2, -1], dtype=torch.int32)}, ValueError, "slots from -1 to 1; got -1 to 2"),
    ({"slot_of_row": torch.tensor([0, -2, 1], dtype=torch.int32)}, ValueError, "slots from -1 to 1; got -2 to 1"),
]


@pytest.mark.parametrize(("wrong", "error", "words"), REFUSED)
def test_what_it_refuses(wrong: dict[str, Tensor], error: type[Exception], words: str) -> None:
    x, base, bits, scales, slots = make(Case(3, 64, 5, 2, 1, by_row=True), torch.float32)
    good = {"x": x, "base_out": base, "bits": bits, "scales": scales, "slot_of_row": slots}
    with pytest.raises(error, match=words):
        delta_linear(**{**good, **wrong})
