"""`linear_with_delta`: what is defined, and, marked `cuda`, the product of weights that are merged on their way in."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from hf_longctx.kernels import dispatch, reference
from hf_longctx.kernels.compiled import delta, library
from hf_longctx.kernels.delta import MANY, delta_linear, joined, linear_with_delta

from .built import need
from .deltas import Case, literal, make

DTYPES = [torch.float16, torch.bfloat16]
CASES = [
    Case(1, 64, 2, 1, 1),
    Case(300, 256, 200, 3, 1, by_row=True),
    Case(700, 192, 130, 2, 3, planes=3, by_row=True),
    Case(520, 1024, 128, 1, 2),
    Case(900, 128, 34, 700, 1),
]


def layer(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    """x, weight, bias, bits, scales, and slots `[R, P]`."""
    x, _, bits, scales, slots = make(case, dtype, device=device)
    made = torch.Generator().manual_seed(1)
    weight = torch.randn(case.outputs, case.inputs, generator=made).to(device, dtype)
    bias = torch.randn(case.outputs, generator=made).to(device, dtype)
    return x, weight, bias, bits, scales, slots.view(case.rows, -1)


def merged(x: Tensor, weight: Tensor, bias: Tensor, bits: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    """In float64, of weights that were merged in float32 and rounded."""
    inputs, outputs = x.shape[1], len(weight)
    out = torch.empty(len(x), outputs, dtype=torch.float64, device=x.device)
    ones, nothing = torch.eye(inputs, device=x.device), torch.zeros(inputs, outputs, device=x.device)
    for of_row in slots.unique(dim=0):
        there = of_row.expand(inputs, -1).contiguous()
        change = reference.OPS["delta_linear"].run(ones, nothing, bits, scales, there).t()
        rows = (slots == of_row).all(1)
        own = (weight.float() + change).to(weight.dtype)
        out[rows] = x[rows].double() @ own.double().t() + bias.double()
    return out


@pytest.mark.parametrize("rows", [3, MANY])
def test_on_a_cpu_it_is_the_layer_and_its_deltas(rows: int) -> None:
    x, weight, bias, bits, scales, slots = layer(Case(rows, 96, 20, 3, 3, planes=2), torch.float32)
    out = linear_with_delta(x, weight, bias, bits, scales, slots)
    assert torch.equal(out, delta_linear(x, linear(x, weight, bias), bits, scales, slots))
    base = linear(x.double(), weight.double(), bias.double())
    want = literal(x, base, bits, scales, slots)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-4)
    defined = reference.OPS["linear_with_delta"].run(x, weight, bias, bits, scales, slots)
    torch.testing.assert_close(defined.double(), want, rtol=1e-5, atol=1e-4)
    without = linear_with_delta(x, weight, None, bits, scales, slots)
    torch.testing.assert_close(without + bias, out)


def test_gradients_go_to_the_weights_too() -> None:
    x, weight, bias, bits, scales, slots = layer(Case(MANY, 32, 3, 2, 1), torch.float32)
    for tensor in (weight, bias, scales):
        tensor.requires_grad_()
    linear_with_delta(x, weight, bias, bits, scales, slots).sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, -1))
    assert bias.grad is not None
    assert scales.grad is not None


def test_refusals() -> None:
    x, weight, bias, bits, scales, slots = layer(Case(MANY, 64, 6, 2, 1), torch.float32)
    with pytest.raises(ValueError, match=r"delta_linear: expected bits \[S, 5, 64 / 32\]"):
        linear_with_delta(x, weight[:5], bias[:5], bits, scales, slots)
    with pytest.raises(ValueError, match=r"slots from -1 to 1; got -1 to 7"):
        linear_with_delta(x, weight, bias, bits, scales, torch.where(slots == 1, 7, slots).int())


@pytest.mark.cuda
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [*CASES, Case(2048, 4096, 1024, 4, 1, by_row=True)])
def test_products_of_merged_weights(case: Case, dtype: torch.dtype) -> None:
    need("cuda")
    arguments = layer(case, dtype, "cuda")
    assert delta.reject_merged(*arguments) is None
    out = delta.linear_with_delta(*arguments)
    torch.testing.assert_close(out.double(), merged(*arguments), rtol=torch.finfo(dtype).eps, atol=0.02)
    for _ in range(3):
        assert torch.equal(delta.linear_with_delta(*arguments), out)


@pytest.mark.cuda
def test_a_row_is_the_same_beside_any_others() -> None:
    need("cuda")
    x, weight, bias, bits, scales, slots = layer(Case(600, 512, 200, 3, 2, planes=2), torch.bfloat16, "cuda")
    whole = delta.linear_with_delta(x, weight, bias, bits, scales, slots)
    made = torch.Generator().manual_seed(1)
    for count in (1, 250, 600):
        rows = torch.randperm(600, generator=made)[:count].cuda()
        some = delta.linear_with_delta(x[rows], weight, bias, bits, scales, slots[rows])
        assert torch.equal(some, whole[rows])
    x[7], x[300] = torch.nan, torch.inf
    slots[11, 0], slots[12, 1] = 3, 2**31 - 1  # there are no such slots
    others = torch.tensor([row for row in range(600) if row not in (7, 11, 12, 300)], device="cuda")
    broken = delta.linear_with_delta(x, weight, bias, bits, scales, slots)
    assert torch.equal(broken[others], whole[others])
    assert broken[[7, 11, 12]].isnan().all()


@pytest.mark.cuda
def test_rows_that_lie_apart_and_no_bias() -> None:
    need("cuda")
    x, weight, bias, bits, scales, slots = layer(Case(300, 128, 64, 2, 1), torch.bfloat16, "cuda")
    apart = torch.zeros(300, 256, dtype=x.dtype, device="cuda")[:, 128:].copy_(x)
    wide = torch.zeros(64, 512, dtype=x.dtype, device="cuda")[:, 64:192].copy_(weight)
    want = delta.linear_with_delta(x, weight, torch.zeros_like(bias), bits, scales, slots)
    assert torch.equal(delta.linear_with_delta(apart, wide, None, bits, scales, slots), want)


@pytest.mark.cuda
def test_it_is_chosen_where_there_are_many_rows_and_can_be_captured() -> None:
    need("cuda")
    x, weight, bias, bits, scales, slots = layer(Case(MANY, 128, 64, 2, 1), torch.bfloat16, "cuda")
    linear_with_delta(x, weight, bias, bits, scales, slots)
    assert dispatch.last_used()["linear_with_delta"] == "compiled"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear_with_delta(x, weight, bias, bits, scales, slots)
    x.mul_(-1.5), slots.copy_(slots.roll(1))
    graph.replay()
    assert torch.equal(captured, linear_with_delta(x, weight, bias, bits, scales, slots))


@pytest.mark.cuda
def test_what_it_does_not_take() -> None:
    need("cuda")
    x, weight, bias, bits, scales, slots = layer(Case(4, 128, 6, 2, 1), torch.bfloat16, "cuda")
    for arguments, reason in (
        ((x.cpu(), weight, bias, bits, scales, slots), "is for CUDA"),
        ((x.float(), weight, bias, bits, scales, slots), "needs x, weight and bias in float16 or bfloat16"),
        ((x, weight, bias.float(), bits, scales, slots), "needs x, weight and bias in float16 or bfloat16"),
        ((x, weight, bias, bits, scales, slots.cpu()), "on one device"),
        ((x, weight[:5], bias[:5], bits[:, :5].contiguous(), scales, slots), "an even number of outputs"),
        ((x[:, :96], weight[:, :96], bias, bits[..., :3].contiguous(), scales, slots), "a multiple of 64"),
        ((x, weight, bias, bits.transpose(0, 1).contiguous().transpose(0, 1), scales, slots), "that are contiguous"),
    ):
        assert reason in str(delta.reject_merged(*arguments))


def beside(case: Case, outputs: tuple[int, ...], device: str) -> tuple[Any, ...]:
    """Layers of the same rows, each with outputs, scales and a bias, or none, of its own."""
    x, _, _, _, _, slots = layer(case, torch.bfloat16, device)
    each = [layer(replace(case, outputs=n, by_row=not i), torch.bfloat16, device)[1:5] for i, n in enumerate(outputs)]
    weights, biases, bits, scales = (list(own) for own in zip(*each, strict=True))
    biases[-1] = None
    return x, weights, biases, bits, scales, slots


@pytest.mark.cuda
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", [Case(300, 256, 2, 3, 1), Case(520, 384, 2, 2, 3, planes=2)])
@pytest.mark.parametrize("outputs", [(130, 34), (34, 300, 128)])
def test_layers_beside_each_other_are_as_they_are_alone(case: Case, outputs: tuple[int, ...]) -> None:
    need("cuda")
    x, weights, biases, bits, scales, slots = beside(case, outputs, "cuda")
    made = joined(x, weights, biases, bits, scales, slots)
    assert made is not None
    assert dispatch.last_used()["linears_with_delta"] == "compiled"
    for own, *one in zip(made, weights, biases, bits, scales, strict=True):
        assert torch.equal(own, delta.linear_with_delta(x, *one, slots))


@pytest.mark.cuda
def test_layers_that_are_not_joined() -> None:
    need("cuda")
    x, weights, biases, bits, scales, slots = beside(Case(300, 256, 2, 3, 1), (64, 66), "cuda")
    for others, reason in (
        ((weights * 2, biases * 2, bits * 2, scales * 2), "takes 1 to 3 layers"),
        ((weights, biases, [bits[0], bits[1][:2]], scales), "as many slots"),
        ((weights, biases, bits, [scales[0], scales[1].expand(-1, -1, 2)]), "groups of inputs, in all layers"),
        (([weights[0], weights[1].float()], biases, bits, scales), "needs x, weight and bias"),
    ):
        assert reason in str(delta.reject_joined(x, *others, slots))
    assert joined(x, weights * 2, biases * 2, bits * 2, scales * 2, slots) is None


SIZES = {"rows": 2, "inputs": 256, "outputs": 8, "slots": 2, "planes": 1, "groups": 1, "scale_rows": 1, "dtype": 2}
REFUSED = [
    ({"dtype": 0}, "expected float16 or bfloat16"),
    ({"slots": 0}, "expected no empty axis"),
    ({"slots": 5000}, "expected at most 4096 slots"),
    ({"inputs": 96}, "expected a multiple of 64 inputs"),
    ({"groups": 3}, "expected groups of a multiple of 64 inputs"),
    ({"outputs": 7}, "expected an even number of outputs"),
    ({"scale_rows": 3}, "expected a scale for each output, or for all"),
    ({"x": 8}, "expected tensors that begin at multiples of 16 bytes"),
    ({"x_r": 4}, "expected rows that begin at multiples of 16 bytes"),
    ({"rows": 1 << 30, "outputs": 1 << 20}, "expected fewer tiles"),
]


@pytest.mark.cuda
@pytest.mark.parametrize(("fields", "words"), REFUSED)
def test_the_library_looks_before_it_launches(fields: dict[str, int], words: str) -> None:
    need("cuda")
    own = delta.HflDelta(**{**SIZES, **fields})
    block: ctypes.Structure = delta.HflJoined(delta.HflMerged(own), 1)
    with pytest.raises(RuntimeError, match=words):
        library.call("hfl_joined_cuda", block)


@pytest.mark.cuda
def test_the_library_looks_at_every_layer() -> None:
    need("cuda")
    first = delta.HflMerged(delta.HflDelta(**SIZES))
    for count in (0, 4):
        with pytest.raises(RuntimeError, match="expected 1 to 3 layers"):
            library.call("hfl_joined_cuda", delta.HflJoined(first, count))
    block = delta.HflJoined(first, 2)
    block.others[0] = delta.HflJoinedPart(7, 1)
    with pytest.raises(RuntimeError, match="expected an even number of outputs"):
        library.call("hfl_joined_cuda", block)
