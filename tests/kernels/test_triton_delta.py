"""Linears with one-bit deltas in Triton: what is defined, in its interpreter on a CPU and, marked `cuda`, on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_longctx.kernels import dispatch
from hf_longctx.kernels.delta import delta_linear, joined
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.triton import delta_linear as kernels
from hf_longctx.kernels.triton import linear_with_delta, signs

from . import test_compiled_delta as compiled
from . import test_delta as defined
from .deltas import Case, make
from .test_triton import DEVICES, need

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SMALL = [*defined.CASES[:2], *(replace(case, outputs=min(case.outputs, 40)) for case in compiled.CASES[:5])]
LARGE = [Case(2048, 4096, 1024, 4, 1, by_row=True), Case(16, 14336, 4096, 16, 1), Case(5, 4096, 6144, 16, 32)]


def run(x: Tensor, base: Tensor, bits: Tensor, scales: Tensor, slots: Tensor) -> Tensor:
    with use_backend("triton"):
        out = delta_linear(x, base, bits, scales, slots)
    assert dispatch.last_used()["delta_linear"] == "triton"
    assert (out.dtype, out.device) == (base.dtype, base.device)
    return out


@pytest.mark.parametrize(
    ("case", "dtype", "device"),
    [(case, (F16, F32)[number % 2], "cpu") for number, case in enumerate((*SMALL, Case(18, 64, 33, 2, 1, planes=3)))]
    + [
        pytest.param(case, dtype, "cuda", marks=pytest.mark.cuda)
        for number, case in enumerate((*SMALL, *defined.CASES[2:], *compiled.CASES[5:]))
        for dtype in (BF16, (F16, F32)[number % 2])
    ]
    + [pytest.param(case, BF16, "cuda", marks=pytest.mark.cuda) for case in LARGE],
    ids=str,
)
def test_what_is_defined(case: Case, dtype: torch.dtype, device: str) -> None:
    need(device)
    arguments = make(case, dtype, device=device)
    out = run(*arguments)
    compiled.near(out, compiled.defined(*arguments), case.inputs)
    alone = arguments[4].view(case.rows, -1).amax(1) < 0
    assert torch.equal(out[alone], arguments[1][alone])
    assert torch.equal(run(*arguments), out)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_lie_apart_and_a_base_of_another_dtype(device: str) -> None:
    need(device)
    x, base, bits, scales, slots = make(Case(6, 256, 50, 3, 1), F16, device=device)
    apart = torch.zeros(6, 512, dtype=F16, device=device)[:, 256:].copy_(x)
    other = torch.zeros(6, 77, dtype=F16, device=device)[:, 3:53].copy_(base)
    assert torch.equal(run(apart, other, bits, scales, slots), run(x, base, bits, scales, slots))
    wide = run(x, base.float(), bits, scales, slots)
    assert torch.equal(wide, run(x.float(), base.float(), bits, scales, slots))
    compiled.near(wide, compiled.defined(x, base, bits, scales, slots), 256)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_is_the_same_beside_any_others(device: str, groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    need(device)
    rows, inputs = (60, 1536) if device == "cuda" else (12, 128)
    case = Case(rows, inputs, 150 if device == "cuda" else 40, 3, groups, planes=2, by_row=True)
    x, base, bits, scales, slots = make(case, F16, device=device)
    whole = run(x, base, bits, scales, slots)
    made = torch.Generator().manual_seed(1)
    for count in (1, 7, *((32, 33, 60) if device == "cuda" else ())):
        some = torch.randperm(rows, generator=made)[:count].to(device)
        assert torch.equal(run(x[some], base[some], bits, scales, slots[some].contiguous()), whole[some])
    many = run(x.repeat(6, 1), base.repeat(6, 1), bits, scales, slots.repeat(6, 1)) if device == "cuda" else whole
    assert torch.equal(many[-rows:], whole)
    x[7], x[9], base[3] = torch.nan, torch.inf, torch.inf
    slots[[7, 9]] = 1
    broken = run(x, base, bits, scales, slots)
    others = torch.tensor([row for row in range(rows) if row not in (3, 7, 9)], device=device)
    assert torch.equal(broken[others], whole[others])
    assert broken[[7, 9]].isnan().all()
    monkeypatch.setattr(kernels, "PIECE", 10)
    assert torch.equal(run(x, base, bits, scales, slots)[others], whole[others])


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_of_very_different_size(device: str) -> None:
    need(device)
    x, base, bits, scales, slots = make(Case(4, 512, 64, 2, 1), F32, device=device)
    x[:, 5] *= 1000
    x[1] *= 2.0**-100
    x[2] *= 2.0**100
    x[3] = 0
    slots.fill_(1)
    base[1:] = 0
    out, want = run(x, base, bits, scales, slots), compiled.defined(x, base, bits, scales, slots)
    for row in range(4):
        size = x[row].double().abs().sum() * scales[1].double() * torch.finfo(F32).eps
        assert bool(((out[row].double() - want[row]).abs() <= want[row].abs() * 2**-23 + size).all())


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_a_slot_that_is_not_there_are_nan(device: str) -> None:
    need(device)
    x, base, bits, scales, slots = make(Case(5, 256, 40, 2, 1), F16, device=device)
    slots = slots[:, None].fill_(1)
    with use_backend("triton"):
        want = kernels.run(x, base, bits, scales, slots)
        slots[1], slots[3] = 2, 2**31 - 1
        out = kernels.run(x, base, bits, scales, slots)
    assert out[[1, 3]].isnan().all()
    assert torch.equal(out[[0, 2, 4]], want[[0, 2, 4]])


@pytest.mark.cuda
def test_a_captured_call_follows_its_rows() -> None:
    need("cuda")
    compiled.check_captured(run)


def test_gradients_are_those_of_the_definition() -> None:
    need("cpu")
    x, base, bits, scales, slots = make(Case(8, 128, 40, 2, 1), F16)
    above, found = torch.randn(8, 40).half(), []
    for backend in ("triton", "reference"):
        inputs = [one.clone().requires_grad_() for one in (x, base, scales)]
        with use_backend(backend):
            out = delta_linear(inputs[0], inputs[1], bits, inputs[2], slots)
        found.append(torch.autograd.grad(out, inputs, above))
    assert all(map(torch.equal, *found))


MERGED = [
    Case(5, 96, 37, 3, 3, by_row=True),
    Case(12, 64, 33, 2, 1, planes=3, by_row=True),
    Case(140, 256, 70, 4, 2, planes=2),
    Case(150, 128, 130, 200, 1),
]


@pytest.mark.parametrize(
    ("case", "device"),
    [(case, "cpu") for case in MERGED[:2]] + [pytest.param(case, "cuda", marks=pytest.mark.cuda) for case in MERGED],
    ids=str,
)
def test_products_with_merged_weights(case: Case, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight and its deltas are rounded as if they had been merged; then sums are of float32."""
    need(device)
    dtype = F16 if device == "cpu" else BF16
    x, _, bits, scales, slots = make(case, dtype, device=device)
    made = torch.Generator().manual_seed(5)
    weights = [torch.randn(n, case.inputs, generator=made).to(device, dtype) for n in (case.outputs, 7)]
    bias = torch.randn(case.outputs, generator=made).to(device, dtype)
    more = make(replace(case, outputs=7), dtype, seed=2, device=device)
    both = (bits, more[2]), (scales, more[3])
    kinds = slots.view(case.rows, -1)
    monkeypatch.setattr(linear_with_delta, "MANY", 1)
    monkeypatch.setattr(linear_with_delta, "tile_of", lambda words: (32, 32, 1, {"num_warps": 4, "STAGES": 2}))
    with use_backend("triton"):
        outs = dispatch.call("linears_with_delta", x, weights, (bias, None), *both, kinds)
        alone = dispatch.call("linear_with_delta", x, weights[0], bias, bits, scales, kinds)
        monkeypatch.setattr(signs, "MOST_COMPARED", 1)
        assert torch.equal(alone, dispatch.call("linear_with_delta", x, weights[0], bias, bits, scales, kinds))
    assert torch.equal(outs[0], alone)
    for out, weight, own, of_bits, of_scales in zip(outs, weights, (bias, None), *both, strict=True):
        for slot in kinds.unique(dim=0):
            rows = (kinds == slot).all(1)
            eye, one = torch.eye(case.inputs, device=device), slot.expand(case.inputs, -1).contiguous()
            whole = compiled.defined(eye, weight.t().float(), of_bits, of_scales, one).to(dtype)
            want = x[rows].double() @ whole.double() + (0 if own is None else own.double())
            compiled.near(out[rows], want, 8 * case.inputs)  # weights are up to that much larger than one


@pytest.mark.parametrize("device", DEVICES)
def test_layers_of_a_few_rows_are_joined(device: str) -> None:
    need(device)
    x, base, bits, scales, slots = make(Case(9, 128, 40, 3, 2, planes=2), F16, device=device)
    weight = base[:1].t().expand(40, 128).contiguous() / 8
    with use_backend("triton"):
        outs = joined(x, (weight, weight[:20]), (None, None), (bits, bits[:, :20].contiguous()), (scales,) * 2, slots)
    assert outs is not None
    plain = torch.nn.functional.linear(x, weight)
    assert torch.equal(outs[0], run(x, plain, bits, scales, slots))
    plain = torch.nn.functional.linear(x, weight[:20])
    assert torch.equal(outs[1], run(x, plain, bits[:, :20].contiguous(), scales, slots))


@pytest.mark.cuda
def test_merged_products_of_a_model_again_and_again() -> None:
    need("cuda")
    x, _, bits, scales, slots = make(Case(2048, 4096, 1024, 4, 1), BF16, device="cuda")
    weight, slots = torch.randn(1024, 4096, device="cuda", dtype=BF16), slots[:, None].contiguous()
    with use_backend("triton"):
        first = dispatch.call("linear_with_delta", x, weight, None, bits, scales, slots)
        for _ in range(5):
            assert torch.equal(first, dispatch.call("linear_with_delta", x, weight, None, bits, scales, slots))
    slots[5] = 4
    with use_backend("triton"):
        again = dispatch.call("linear_with_delta", x, weight, None, bits, scales, slots)
    assert again[5].isnan().all()
    others = torch.arange(2048, device="cuda") != 5
    assert torch.equal(again[others], first[others])


def test_what_it_does_not_take() -> None:
    need("cpu")
    x, base, bits, scales, slots = make(Case(3, 64, 5, 2, 1), F16)
    slots = slots[:, None]
    for arguments, reason in (
        ((x.double(), base, bits, scales, slots), "needs x and base_out in float32, float16 or bfloat16"),
        ((x, base.bfloat16(), bits, scales, slots), "has no bfloat16 in Triton's interpreter"),
        ((x[:0], base[:0], bits, scales, slots[:0]), "takes no empty tensors"),
        ((x, base, bits.transpose(0, 1).contiguous().transpose(0, 1), scales, slots), "that are contiguous"),
        ((x, base, bits, scales, slots.to("meta")), "on one device"),
    ):
        assert reason in str(kernels.reject(*arguments))
    wide = make(Case(1, 1 << 17, 1, 1, 1), F16)
    assert "at most 65536 inputs" in str(kernels.reject(*wide[:4], wide[4][:, None]))
