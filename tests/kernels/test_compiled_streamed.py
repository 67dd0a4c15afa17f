"""`linear_with_delta` of few rows in the compiled library: weights and bits by one kernel."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_longctx.kernels import dispatch, layers, reference
from hf_longctx.kernels.compiled import library, streamed
from hf_longctx.kernels.delta import linear_with_delta

from .built import need
from .deltas import Case, make

DTYPES = [torch.float16, torch.bfloat16]
CASES = [
    Case(1, 128, 2, 1, 1),
    Case(4, 1024, 130, 3, 1),
    Case(5, 640, 64, 2, 1),
    Case(8, 3968, 33, 9, 1),
    Case(9, 4096, 300, 16, 1),
    Case(16, 6144, 2112, 16, 1),
    Case(16, 14336, 100, 16, 1),
    Case(4, 5120, 4333, 3, 1),
    Case(16, 5120, 4333, 3, 1),
]


def layer(case: Case, dtype: torch.dtype, device: str = "cuda") -> tuple[Tensor, ...]:
    """x, weight, bias, bits, scales, and slots `[R, 1]`."""
    x, _, bits, scales, slots = make(case, dtype, device=device)
    made = torch.Generator().manual_seed(1)
    weight = torch.randn(case.outputs, case.inputs, generator=made).to(device, dtype)
    bias = torch.randn(case.outputs, generator=made).to(device, dtype)
    return x, weight, bias, bits, scales, slots.view(case.rows, -1)


def one(x: Tensor, weight: Tensor, bias: Tensor | None, bits: Tensor, scales: Tensor, slots: Tensor) -> tuple[Any, ...]:
    """As the library takes a single layer."""
    return x, [weight], [bias], [bits], [scales], slots


def run(*arguments: Any) -> Tensor:
    return streamed.linears_with_delta(*one(*arguments))[0]


def defined(x: Tensor, weight: Tensor, bias: Tensor, bits: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    """In float64, not rounded to the dtype of x."""
    base = linear(x.double(), weight.double(), bias.double())
    out: Tensor = reference.OPS["delta_linear"].run(x.double(), base, bits, scales.double(), slots)
    return out


@pytest.mark.cuda
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_what_is_defined(case: Case, dtype: torch.dtype) -> None:
    need("cuda")
    arguments = layer(case, dtype)
    assert streamed.reject(*one(*arguments)) is None
    out = run(*arguments)
    noise = 4 * case.inputs * torch.finfo(torch.float32).eps
    torch.testing.assert_close(out.double(), defined(*arguments), rtol=torch.finfo(dtype).eps, atol=noise)
    for _ in range(3):
        assert torch.equal(run(*arguments), out)


@pytest.mark.cuda
@pytest.mark.parametrize("outputs", [200, 4333])
def test_a_row_is_the_same_beside_any_others(outputs: int) -> None:
    need("cuda")
    x, weight, bias, bits, scales, slots = layer(Case(16, 6272, outputs, 5, 1), torch.bfloat16)
    whole = run(x, weight, bias, bits, scales, slots)
    made = torch.Generator().manual_seed(1)
    for count in (1, 2, 4, 5, 8, 9, 16):
        rows = torch.randperm(16, generator=made)[:count].cuda()
        assert torch.equal(run(x[rows], weight, bias, bits, scales, slots[rows]), whole[rows])
    x[7], x[9] = torch.nan, torch.inf
    slots[11], slots[12] = 5, 2**31 - 1  # there are no such slots
    others = torch.tensor([row for row in range(16) if row not in (7, 9, 11, 12)], device="cuda")
    broken = run(x, weight, bias, bits, scales, slots)
    assert torch.equal(broken[others], whole[others])
    assert broken[[7, 11, 12]].isnan().all()
    assert not broken[9].isfinite().any()


@pytest.mark.cuda
def test_rows_that_lie_apart_and_no_bias() -> None:
    need("cuda")
    x, weight, bias, bits, scales, slots = layer(Case(6, 384, 50, 3, 1), torch.bfloat16)
    apart = torch.zeros(6, 512, dtype=x.dtype, device="cuda")[:, 128:].copy_(x)
    wide = torch.zeros(50, 512, dtype=x.dtype, device="cuda")[:, 64:448].copy_(weight)
    want = run(x, weight, torch.zeros_like(bias), bits, scales, slots)
    assert torch.equal(run(apart, wide, None, bits, scales, slots), want)


@pytest.mark.cuda
def test_slots_that_the_kernel_before_writes() -> None:
    """It begins before that one is done."""
    need("cuda")
    x, weight, bias, bits, scales, _ = layer(Case(16, 4096, 520, 16, 1), torch.bfloat16)
    ones = torch.full((16, 2), 1.28125, dtype=torch.bfloat16, device="cuda")  # of which the SiLU is 1
    made = torch.Generator().manual_seed(1)
    for turn in range(20):
        slots = (torch.randperm(17, generator=made)[:16] - 1).clamp(min=0).int().cuda()[:, None]
        want = run(x, weight, bias, bits, scales, slots)
        written = layers.gated(ones, slots.view(torch.bfloat16)).view(torch.int32)
        out = run(x, weight, bias, bits, scales, written)
        assert torch.equal(written, slots), turn
        assert torch.equal(out, want), turn


@pytest.mark.cuda
def test_more_outputs_than_fit_at_a_time() -> None:
    need("cuda")
    arguments = layer(Case(9, 16384, 16 * 8 * 16 * 10, 1, 1), torch.bfloat16)
    out = run(*arguments)
    torch.testing.assert_close(out.double(), defined(*arguments), rtol=2**-7, atol=0.01)


@pytest.mark.cuda
def test_layers_of_the_same_rows() -> None:
    need("cuda")
    parts = [layer(Case(16, 1024, outputs, 4, 1), torch.bfloat16) for outputs in (200, 16, 72)]
    x, slots = parts[0][0], parts[0][5]
    weights, biases, bits, scales = ([part[i] for part in parts] for i in (1, 2, 3, 4))
    biases[1] = None
    assert streamed.reject(x, weights, biases, bits, scales, slots) is None
    made = streamed.linears_with_delta(x, weights, biases, bits, scales, slots)
    for own, *part in zip(made, weights, biases, bits, scales, strict=True):
        assert torch.equal(own, run(x, *part, slots))


@pytest.mark.cuda
def test_it_is_chosen_where_there_are_few_rows_and_can_be_captured() -> None:
    need("cuda")
    x, weight, bias, bits, scales, slots = layer(Case(9, 512, 64, 4, 1), torch.bfloat16)
    linear_with_delta(x, weight, bias, bits, scales, slots)
    assert dispatch.last_used()["linears_with_delta"] == "compiled"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear_with_delta(x, weight, bias, bits, scales, slots)
        again = linear_with_delta(captured[:, :0].new_ones(9, 512) * captured[:, :1], weight, bias, bits, scales, slots)
    for _ in range(3):
        x.mul_(-1.5), slots.copy_(slots.roll(1))
        graph.replay()
        want = linear_with_delta(x, weight, bias, bits, scales, slots)
        assert torch.equal(captured, want)
        assert torch.equal(
            again, linear_with_delta(torch.ones_like(x) * want[:, :1], weight, bias, bits, scales, slots)
        )


@pytest.mark.cuda
def test_what_it_does_not_take() -> None:
    need("cuda")
    x, weight, bias, bits, scales, slots = layer(Case(4, 256, 6, 2, 1), torch.bfloat16)
    for arguments, reason in (
        ((x.float(), weight, bias, bits, scales, slots), "in float16 or bfloat16"),
        ((x, weight, bias, bits, scales, slots.cpu()), "on one device"),
        ((x, weight, bias, bits, scales.expand(2, 6, 1), slots), "one scale for each slot"),
        ((x, weight, bias, bits, scales, slots.expand(4, 2)), "one slot for each row"),
        ((x[:, :96], weight[:, :96], bias, bits[..., :3].contiguous(), scales, slots), "a multiple of 128"),
        ((x, weight, bias, bits.transpose(0, 1).contiguous().transpose(0, 1), scales, slots), "that are contiguous"),
        ((x, weight.clone().requires_grad_(), bias, bits, scales, slots), "no gradients"),
    ):
        assert reason in str(streamed.reject(*one(*arguments)))
    large = torch.empty(1, 1 << 17, dtype=x.dtype, device="cuda").expand(1 << 20, -1)
    words = bits[:, :1, :1].expand(-1, 1 << 20, 1 << 12)
    assert "words of bits" in str(streamed.reject(large[:1], [large], [None], [words], [scales], slots[:1]))


SIZES = {"rows": 2, "inputs": 256, "slots": 2, "dtype": 2, "parts": 1}
REFUSED = [
    ({"dtype": 0}, "expected float16 or bfloat16"),
    ({"rows": 17}, "expected 1 to 16 rows"),
    ({"parts": 4}, "expected 1 to 3 layers"),
    ({"inputs": 96}, "expected a multiple of 128 inputs"),
    ({"slots": 0}, "expected at least 1 slot"),
    ({"x": 8}, "expected rows that begin at multiples of 16 bytes"),
    ({}, "expected outputs"),
]


@pytest.mark.cuda
@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_the_library_looks_before_it_launches(fields: dict[str, int], words: str) -> None:
    need("cuda")
    block: ctypes.Structure = streamed.HflStreamed(**{**SIZES, **fields})
    with pytest.raises(RuntimeError, match=words):
        library.call("hfl_streamed_cuda", block)
