"""Products of few rows with weights of 16 bits, against torch's in float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from hf_longctx.kernels import layers
from hf_longctx.kernels.compiled import library, project

from .built import need

SHAPES = [
    (8, (8,)),
    (64, (8, 16, 24)),
    (264, (16, 8)),
    (1024, (128, 32, 32)),
    (1032, (8,)),
    (4096, (512, 64, 64)),
    (14336, (64,)),
]
DTYPES = [torch.bfloat16, torch.float16]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def case(
    inputs: int, outputs: tuple[int, ...], rows: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x = random(rows, inputs).to("cuda", dtype)
    weights = [(random(n, inputs, seed=n + i) / inputs**0.5).to("cuda", dtype) for i, n in enumerate(outputs)]
    return x, weights, [random(n, seed=2 * n + i).to("cuda", dtype) for i, n in enumerate(outputs)]


def close(got: Tensor, wanted: Tensor) -> None:
    """To the rounding of the result, and of sums in float32."""
    torch.testing.assert_close(got.double(), wanted, rtol=torch.finfo(got.dtype).eps, atol=1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_products(inputs: int, outputs: tuple[int, ...], dtype: torch.dtype, rows: int) -> None:
    need("cuda")
    x, weights, biases = case(inputs, outputs, rows, dtype)
    for given in (biases, [None] * len(biases), [biases[0], *[None] * (len(biases) - 1)]):
        assert project.reject(x, weights, given) is None
        for got, weight, bias in zip(project.project(x, weights, given), weights, given, strict=True):
            wanted = x.double() @ weight.double().T
            close(got, wanted if bias is None else wanted + bias.double())


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 8), (64, 24), (576, 1536), (4096, 1032)])
def test_gated_products(inputs: int, outputs: int, dtype: torch.dtype, rows: int) -> None:
    """Its parts are rounded as the definition's: beside a sum that was rounded otherwise, an ulp of each part."""
    need("cuda")
    x, (gate, up), _ = case(inputs, (outputs, outputs), rows, dtype)
    got = project.project_gated(x, gate, up).double()
    halves = [(x.double() @ w.double().T) for w in (gate, up)]
    wanted = silu(halves[0]) * halves[1]
    bound = 4 * torch.finfo(dtype).eps * (halves[0].abs() + 1e-3) * halves[1].abs() + 1e-5
    assert ((got - wanted).abs() <= bound).all()
    rounded = [half.to(dtype) for half in halves]
    same = (project.project(x, [gate], [None])[0] == rounded[0]) & (project.project(x, [up], [None])[0] == rounded[1])
    expected = silu(rounded[0]) * rounded[1]
    assert same.float().mean() > 0.9
    assert torch.equal(got[same].to(dtype), expected[same])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    need("cuda")
    x, weights, biases = case(2048, (256, 64, 64), 4, dtype)
    together = project.project(x, weights, biases)
    gated = project.project_gated(x, weights[1], weights[2])
    for row in range(4):
        alone = x[row : row + 1].clone()
        for got, wanted in zip(project.project(alone, weights, biases), together, strict=True):
            assert torch.equal(got[0], wanted[row])
        assert torch.equal(project.project_gated(alone, weights[1], weights[2])[0], gated[row])
    assert all(torch.equal(a, b) for a, b in zip(project.project(x, weights, biases), together, strict=True))


@pytest.mark.cuda
def test_a_captured_call_follows_its_input() -> None:
    need("cuda")
    x, weights, biases = case(512, (64, 32), 2, torch.bfloat16)

    def run() -> Tensor:
        inner = project.project(x, weights, biases)[0]
        return project.project(inner, [weights[0][:, :64].contiguous()], [None])[0]

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for _ in range(3):
        x.mul_(-1.25)
        weights[0].mul_(0.5)
        graph.replay()
        assert torch.equal(captured, run())


@pytest.mark.cuda
def test_what_it_does_not_take() -> None:
    need("cuda")
    x, weights, biases = case(64, (8, 16), 2, torch.bfloat16)
    more = torch.cat([x, x, x])
    for rows, others, given, reason in (
        (more, weights, biases, "takes 1 to 4 rows"),
        (x[:0], weights, biases, "takes 1 to 4 rows"),
        (x.float(), [w.float() for w in weights], [b.float() for b in biases], "in one dtype, float16 or bfloat16"),
        (x, [weights[0].half()], [None], "in one dtype"),
        (x[:, :60], [weights[0][:, :60]], [None], "multiples of 8 inputs"),
        (x, [weights[0][:6]], [None], "of 8 outputs"),
        (x[:, :32], weights, biases, "as many inputs"),
        (x, [weights[0].cpu()], [None], "on one device"),
        (x.t().contiguous().t(), weights, biases, "side by side"),
        (x[:, 4:60], [weights[0][:, :56].contiguous()], [None], "begin at multiples of 16 bytes"),
        (x[:, :32], [weights[0][:, :32]], [None], "contiguous weights"),
        (x.clone().requires_grad_(), weights, biases, "computes no gradients"),
    ):
        assert reason in str(project.reject(rows, others, given)), reason
    assert "halves of one shape" in str(project.reject_gated(x, weights[0], weights[1]))


FINE = {"rows": 1, "inputs": 8, "dtype": 2, "parts": 1}


@pytest.mark.cuda
@pytest.mark.parametrize(
    ("values", "outputs", "message"),
    [
        ({"dtype": 0}, (8,), "expected float16 or bfloat16"),
        ({"rows": 5}, (8,), "expected 1 to 4 rows"),
        ({"parts": 4}, (8,), "expected 1 to 3 weights"),
        ({"parts": 2, "gated": 1}, (8, 12), "expected two weights of as many outputs"),
        ({"inputs": 12}, (8,), "expected a multiple of 8 inputs"),
        ({"x": 8}, (8,), "expected rows that begin at multiples of 16 bytes"),
        ({}, (12,), "expected a multiple of 8 outputs"),
        ({}, (0,), "expected a multiple of 8 outputs"),
    ],
)
def test_the_library_refuses(values: dict[str, int], outputs: tuple[int, ...], message: str) -> None:
    need("cuda")
    block = project.HflProject(**{**FINE, **values})
    block.outputs = (ctypes.c_int32 * project.MOST_PARTS)(*outputs)
    with pytest.raises(RuntimeError, match=message):
        library.run("project", block, torch.device("cuda", 0))


def test_on_a_cpu_they_are_left_to_torch() -> None:
    need("cpu")
    x, weight = random(2, 16).bfloat16(), random(8, 16, seed=1).bfloat16()
    assert "is for CUDA" in str(project.reject(x, [weight], [None]))
    assert torch.equal(layers.project(x, [weight], [None])[0], torch.nn.functional.linear(x, weight))
    made, bits = layers.project(x, [weight], [None])[0], layers.project_gated(x, weight, weight)
    assert torch.equal(bits, silu(made) * made)
