"""`linear_of_rows`: rows and matrices of their own, in one launch."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import dispatch, reference
from hf_longctx.kernels.compiled import library, tables
from hf_longctx.kernels.tables import linear_of_rows

from .built import need

DTYPES = [torch.float16, torch.bfloat16]
ROWS: list[list[int]] = [[2], [0, 1, 2, 3], [3, 1, 1, 0, 3, 3, 3], [1, 1, 0, 1, 2, 1, 1, 1, 1, 1, 1, 1, 3, 1, 1, 0]]


def layers(inputs: int, dtype: torch.dtype, rows: int, device: str = "cpu") -> tuple[Tensor, list[Any], list[Any]]:
    """x; four matrices of different sizes, two of them int8; their scales."""
    made = torch.Generator().manual_seed(0)
    weights = [torch.randn(count, inputs, generator=made).to(dtype) for count in (300, 7)]
    weights += [torch.randint(-128, 128, (count, inputs), generator=made, dtype=torch.int8) for count in (290, 301)]
    scales = [None, None, *(torch.rand(len(w), 1, generator=made) + 0.5 for w in weights[2:])]
    x = torch.randn(rows, inputs, generator=made).to(dtype)
    there = [None if scale is None else scale.to(device) for scale in scales]
    return x.to(device), [w.to(device) for w in weights], there


def literal(x: Tensor, weights: list[Tensor], scales: list[Tensor | None], numbers: list[int], width: int) -> Tensor:
    """In float64."""
    out = torch.full((len(x), width), -torch.inf, dtype=torch.float64, device=x.device)
    for row, number in enumerate(numbers):
        scale = scales[number]
        weight = weights[number].double() * (1.0 if scale is None else scale.double())
        out[row, : len(weight)] = weight @ x[row].double()
    return out


def test_the_definition_is_what_it_says() -> None:
    for numbers in ROWS:
        x, weights, scales = layers(96, torch.float32, len(numbers))
        found = reference.OPS["linear_of_rows"].run(x, weights, scales, numbers, 310)
        torch.testing.assert_close(found.double(), literal(x, weights, scales, numbers, 310), rtol=1e-5, atol=1e-2)


def test_what_does_not_fit_is_refused() -> None:
    x, weights, scales = layers(96, torch.float32, 2)
    assert linear_of_rows(x, weights, scales, [0, 3], 301) is None  # for CUDA alone
    for numbers, width, others, words in (
        ([0], 301, scales, "x \\[R, K\\] and a matrix for each row"),
        ([0, 4], 301, scales, "numbers of these; got 4, 4 scales, and \\[0, 4\\]"),
        ([0, 1], 300, scales, "weights \\[up to 300, 96\\]; got \\[301, 96\\]"),
        ([0, 1], 301, [*scales[:3], torch.ones(301)], "scales \\[301, 1\\]; got \\[301\\]"),
    ):
        with pytest.raises(ValueError, match=words):
            linear_of_rows(x, weights, others, numbers, width)
    for others in ([None] * 4, [torch.ones(300, 1), *scales[1:]]):
        with pytest.raises(TypeError, match="or int8 and float32 scales; got"):
            linear_of_rows(x, weights, others, [0, 1], 301)


@pytest.mark.cuda
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [64, 192, 1088, 8192])
def test_what_is_defined(inputs: int, dtype: torch.dtype) -> None:
    need("cuda")
    for numbers in ROWS:
        x, weights, scales = layers(inputs, dtype, len(numbers), "cuda")
        out = linear_of_rows(x, weights, scales, numbers, 310)
        assert out is not None
        assert dispatch.last_used()["linear_of_rows"] == "compiled"
        noise = 512 * inputs * torch.finfo(torch.float32).eps
        wanted = literal(x, weights, scales, numbers, 310)
        torch.testing.assert_close(out.double(), wanted, rtol=torch.finfo(dtype).eps, atol=noise)
        for row, number in enumerate(numbers):  # the same alone
            one = linear_of_rows(x[row : row + 1], [weights[number]], [scales[number]], [0], 301)
            assert one is not None
            assert torch.equal(one[0], out[row, :301])


@pytest.mark.cuda
def test_one_table_of_many_rows_with_many_inputs() -> None:
    need("cuda")
    made = torch.Generator("cuda").manual_seed(0)
    x, weight = (torch.randn(n, 50048, generator=made, device="cuda", dtype=torch.bfloat16) for n in (16, 40))
    apart = torch.zeros(16, 50048 + 8, device="cuda", dtype=torch.bfloat16)[:, 8:].copy_(x)
    out = linear_of_rows(apart, [weight], [None], [0] * 16, 40)
    assert out is not None
    wanted = literal(x, [weight], [None], [0] * 16, 40)
    torch.testing.assert_close(out.double(), wanted, rtol=2**-8, atol=4 * 50048 * 2.0**-24)


@pytest.mark.cuda
def test_what_it_does_not_take() -> None:
    need("cuda")
    x, weights, scales = layers(128, torch.bfloat16, 2, "cuda")
    for arguments, reason in (
        ((x.float(), weights, scales, [0, 1], 301), "x in float16 or bfloat16"),
        ((x[:, :96], [w[:, :96].contiguous() for w in weights], scales, [0, 1], 301), "multiple of 64 inputs"),
        ((x, [w[:, :64] for w in weights], scales, [0, 1], 301), "contiguous"),
        ((x, [weights[0].cpu(), *weights[1:]], scales, [0, 1], 301), "one device"),
        ((x.expand(17, -1, -1)[:, 0], weights, scales, [0] * 17, 301), "1 to 16 rows"),
    ):
        assert reason in str(tables.reject(*arguments))
    assert linear_of_rows(x[:, :96], [w[:, :96].contiguous() for w in weights], scales, [0, 1], 301) is None
    with torch.enable_grad():
        assert "no gradients" in str(tables.reject(x.requires_grad_(), weights, scales, [0, 1], 301))


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"dtype": 0}, "float16 or bfloat16"),
        ({"rows": 17}, "1 to 16 rows"),
        ({"inputs": 96}, "multiple of 64"),
        ({"tables": 0}, "as many tables"),
        ({"width": 0}, "expected outputs, and rows"),
        ({"x": 8}, "multiples of 16 bytes"),
    ],
)
def test_the_library_looks_before_it_launches(fields: dict[str, int], words: str) -> None:
    need("cuda")
    sizes = {"rows": 1, "inputs": 64, "width": 8, "tables": 1, "dtype": 2}
    block: ctypes.Structure = tables.HflTables(**{**sizes, **fields})
    with pytest.raises(RuntimeError, match=words):
        library.call("hfl_tables_cuda", block)
