"""`delta_linear` of the compiled library: what is defined, on the CPU and, marked `cuda`, on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import reference
from hf_longctx.kernels.compiled import delta, library
from hf_longctx.kernels.delta import delta_linear

from .built import need
from .deltas import Case, make

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float16, torch.bfloat16]
CASES = [
    Case(1, 128, 1, 1, 1),
    Case(3, 1024, 130, 1, 1, by_row=True),  # rows of one slot, for one, two and three tiles of columns
    Case(6, 1152, 70, 1, 1),
    Case(9, 2176, 300, 1, 17, by_row=True),
    Case(16, 1024, 257, 16, 1, by_row=True),
    Case(40, 1280, 129, 3, 5, planes=2),
    Case(600, 256, 40, 5, 2, planes=3, by_row=True),
    Case(700, 128, 33, 600, 1),
]


def defined(x: Tensor, base: Tensor, bits: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    """In float64, not rounded to the dtype of base."""
    rows = slots if slots.ndim == 2 else slots[:, None]
    out: Tensor = reference.OPS["delta_linear"].run(x.double(), base.double(), bits, scales.double(), rows)
    return out


def run(x: Tensor, base: Tensor, bits: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    rows = slots if slots.ndim == 2 else slots[:, None]
    assert delta.reject(x, base, bits, scales, rows) is None
    return delta.delta_linear(x, base, bits, scales, rows)


def near(got: Tensor, want: Tensor, inputs: int) -> None:
    noise = 2 * inputs * torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.double(), want, rtol=torch.finfo(got.dtype).eps, atol=noise)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_what_is_defined(case: Case, dtype: torch.dtype, device: str) -> None:
    need(device)
    arguments = make(case, dtype, device=device)
    out = run(*arguments)
    assert (out.dtype, out.device) == (dtype, arguments[1].device)
    near(out, defined(*arguments), case.inputs)
    alone = arguments[4].view(case.rows, -1).amax(1) < 0
    assert torch.equal(out[alone], arguments[1][alone])


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_lie_apart(device: str) -> None:
    need(device)
    x, base, bits, scales, slots = make(Case(6, 256, 50, 3, 1), torch.bfloat16, device=device)
    apart = torch.zeros(6, 512, dtype=x.dtype, device=device)[:, 256:].copy_(x)
    other = torch.zeros(6, 77, dtype=x.dtype, device=device)[:, 3:53].copy_(base)
    assert torch.equal(run(apart, other, bits, scales, slots), run(x, base, bits, scales, slots))


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_is_the_same_beside_any_others(device: str, groups: int) -> None:
    need(device)
    case = Case(60, 1536, 150, 3, groups, planes=2, by_row=True)  # more rows than a kernel for few rows takes
    x, base, bits, scales, slots = make(case, torch.bfloat16, device=device)
    slots[:12] = slots[0]  # so that a piece is full
    whole = run(x, base, bits, scales, slots)
    made = torch.Generator().manual_seed(1)
    for count in (1, 2, 7, 32, 33, 60):
        rows = torch.randperm(60, generator=made)[:count].to(device)
        assert torch.equal(run(x[rows], base[rows], bits, scales, slots[rows].contiguous()), whole[rows])
    x[7], x[9], base[3] = torch.nan, torch.inf, torch.inf
    broken = run(x, base, bits, scales, slots)
    others = torch.tensor([row for row in range(60) if row not in (3, 7, 9)], device=device)
    assert torch.equal(broken[others], whole[others])
    assert broken[7].isnan().all()
    assert not broken[9].isfinite().any()


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_of_very_different_size(device: str) -> None:
    need(device)
    x, base, bits, scales, slots = make(Case(4, 512, 64, 2, 1), torch.bfloat16, device=device)
    x[:, 5] *= 1000
    x[1] *= 2.0**-100
    x[2] *= 2.0**100
    x[3] = 0
    slots.fill_(1)
    base[1:] = 0
    out, want = run(x, base, bits, scales, slots), defined(x, base, bits, scales, slots)
    for row in range(4):
        size = x[row].double().abs().sum() * scales[1].double() * torch.finfo(torch.float32).eps
        assert bool(((out[row].double() - want[row]).abs() <= want[row].abs() * 2**-8 + size).all())


@pytest.mark.usefixtures("poisoned")
def test_float32_on_a_cpu() -> None:
    need("cpu")
    case = Case(9, 96, 70, 3, 3, planes=2, by_row=True)
    arguments = make(case, torch.float32)
    near(run(*arguments), defined(*arguments), case.inputs)


def test_the_number_of_threads_changes_nothing() -> None:
    need("cpu")
    arguments = make(Case(70, 256, 200, 4, 1), torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(*arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.cuda
def test_rows_of_a_slot_that_is_not_there_are_nan() -> None:
    need("cuda")
    x, base, bits, scales, slots = make(Case(5, 256, 140, 2, 1), torch.bfloat16, device="cuda")
    slots.fill_(1)
    want = run(x, base, bits, scales, slots)
    slots[1], slots[3] = 2, 2**31 - 1
    out = run(x, base, bits, scales, slots)
    assert out[[1, 3]].isnan().all()
    assert torch.equal(out[[0, 2, 4]], want[[0, 2, 4]])


def check_captured(add: Callable[..., Tensor]) -> None:
    """Rows and slots lie in the same memory; what they are may change."""
    x, base, bits, scales, slots = make(Case(9, 1024, 200, 4, 1, by_row=True), torch.bfloat16, device="cuda")
    add(x, base, bits, scales, slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = add(x, base, bits, scales, slots)
    for step in range(3):
        x.mul_(-1.5), base.add_(step), slots.copy_(slots.roll(1))
        graph.replay()
        assert torch.equal(captured, add(x, base, bits, scales, slots))


@pytest.mark.cuda
def test_a_captured_call_follows_its_rows() -> None:
    need("cuda")
    check_captured(delta_linear)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_of_a_model(dtype: torch.dtype) -> None:
    """Many rows of few slots, and as many slots as rows; again and again, since a race shows only now and then."""
    need("cuda")
    for case in (Case(2048, 4096, 1024, 4, 1, by_row=True), Case(16, 14336, 4096, 16, 1), Case(5, 4096, 6144, 16, 32)):
        arguments = make(case, dtype, device="cuda")
        out = run(*arguments)
        near(out, defined(*arguments), case.inputs)
        for _ in range(5):
            assert torch.equal(run(*arguments), out)


def test_what_it_does_not_take() -> None:
    need("cpu")
    x, base, bits, scales, slots = make(Case(3, 64, 5, 2, 1), torch.bfloat16)
    slots = slots[:, None]
    for arguments, reason in (
        ((x, base.float(), bits, scales, slots), "needs x and base_out in float16 or bfloat16, or float32"),
        ((x[:0], base[:0], bits, scales, slots[:0]), "takes no empty tensors"),
        ((x, base, bits.transpose(0, 1).contiguous().transpose(0, 1), scales, slots), "that are contiguous"),
        ((x, base, bits, scales, slots.to("meta")), "on one device"),
    ):
        assert reason in str(delta.reject(*arguments))


@pytest.mark.cuda
def test_what_it_does_not_take_on_cuda() -> None:
    need("cuda")
    for case, dtype, reason in (
        (Case(3, 256, 5, 2, 1), torch.float32, "needs x and base_out in float16 or bfloat16"),
        (Case(3, 192, 5, 2, 1), torch.bfloat16, "a multiple of 128"),
        (Case(3, 256, 5, 2, 4), torch.bfloat16, "a multiple of 128"),
        (Case(1, 1 << 17, 1, 1, 1), torch.bfloat16, "at most 65536 inputs"),
    ):
        x, base, bits, scales, slots = make(case, dtype, device="cuda")
        assert reason in str(delta.reject(x, base, bits, scales, slots[:, None]))


SIZES = {"rows": 2, "inputs": 256, "outputs": 8, "slots": 2, "planes": 1, "groups": 1, "scale_rows": 1, "dtype": 2}
REFUSED = [
    ("cpu", {"dtype": 3}, "expected float32, float16 or bfloat16"),
    ("cpu", {"planes": 0}, "expected no empty axis"),
    ("cpu", {"inputs": 48}, "groups of a multiple of 32 inputs"),
    ("cpu", {"groups": 3}, "groups of a multiple of 32 inputs"),
    ("cpu", {"scale_rows": 3}, "expected a scale for each output, or for all"),
    pytest.param("cuda", {"dtype": 0}, "expected float16 or bfloat16", marks=pytest.mark.cuda),
    pytest.param("cuda", {"slots": 0}, "expected no empty axis", marks=pytest.mark.cuda),
    pytest.param("cuda", {"slots": 5000}, "expected at most 4096 slots", marks=pytest.mark.cuda),
    pytest.param("cuda", {"inputs": 192}, "expected a multiple of 128 inputs", marks=pytest.mark.cuda),
    pytest.param("cuda", {"groups": 4}, "expected groups of a multiple of 128 inputs", marks=pytest.mark.cuda),
    pytest.param("cuda", {"scale_rows": 3}, "expected a scale for each output, or for all", marks=pytest.mark.cuda),
    pytest.param("cuda", {"x": 8}, "expected tensors that begin at multiples of 16 bytes", marks=pytest.mark.cuda),
    pytest.param("cuda", {"x_r": 4}, "expected rows that begin at multiples of 16 bytes", marks=pytest.mark.cuda),
    pytest.param(
        "cuda",
        {"rows": 1 << 30, "outputs": 1 << 20, "scale_rows": 1},
        "expected fewer than 2.31 tiles",
        marks=pytest.mark.cuda,
    ),
]


@pytest.mark.parametrize(("kind", "fields", "words"), REFUSED)
def test_the_library_looks_before_it_starts(kind: str, fields: dict[str, int], words: str) -> None:
    need(kind)
    block: ctypes.Structure = delta.HflDelta(**{**SIZES, **fields})
    with pytest.raises(RuntimeError, match=words):
        library.call(f"hfl_delta_{kind}", block, *([1] if kind == "cpu" else []))
