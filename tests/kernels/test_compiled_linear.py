"""Quantized linears in the compiled library: the very bits of the definition, on the CPU and, marked `cuda`, there."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from hf_longctx.kernels import dispatch, linear, ops, packing
from hf_longctx.kernels.compiled import library
from hf_longctx.kernels.compiled import linear as compiled
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.linear import PackedWeight, Tokens

from .built import need
from .weights import FORMS, moved, random_codes, random_tokens

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
devices = pytest.mark.parametrize("device", DEVICES)
forms = pytest.mark.parametrize("form", FORMS)
SIXTEEN = [torch.bfloat16, torch.float16]
PLANNED = [
    *((17, 2, 5, 64, 0, 1, 1), (17, 1, 128, 64, 0, 2, 1), (200, 65, 12, 64, 0, 1, 2), (100, 60, 120, 64, 0, 2, 2)),
    *((250, 130, 9, 128, 0, 1, 2), (200, 60, 40, 128, 0, 2, 2), (40, 500, 9, 64, 0, 0, 4), (100, 301, 9, 128, 0, 0, 4)),
    *((40, 301, 9, 64, 0, 2, 4), (64, 448, 32, 64, 0, 2, 4), (16, 441, 15, 16, 0, 2, 4), (5, 448, 32, 16, 0, 2, 4)),
    *((16, 96, 32, 16, 0, 1, 1), (9, 30, 57, 16, 0, 2, 1), (2, 33, 3, 16, 0, 1, 1), (12, 700, 7, 16, 0, 0, 4)),
    *((300, 26, 16, 128, 0, 0, 0), (300, 178, 64, 128, 3, 0, 0), (300, 90, 16, 256, 0, 0, 0)),
    (2500, 134, 96, 256, 10, 0, 0),
]
"""On 132 multiprocessors, tokens, panels of 64 rows, steps of 128 columns; and which tiles are computed then: tokens of
one, how many of them are split, blocks of a cluster, or 0 where there are none, and panels, or 0 in linear_many.cuh; 4
that a cluster has together are those of linear_pair.cuh."""


def dtypes(device: str) -> list[torch.dtype]:
    return SIXTEEN if device == "cuda" else [*SIXTEEN, torch.float32]


def product(tokens: Tokens, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype, device: str) -> Tensor:
    """From the library, on a device."""
    need(device)
    tokens, weight = moved(tokens, device), moved(weight, device)
    with use_backend("compiled"):
        out = linear.w4a8_linear(tokens, weight, None if bias is None else bias.to(device), dtype)
    return out.cpu()


def defined(*arguments: Any) -> Tensor:
    with use_backend("reference"):
        return linear.w4a8_linear(*arguments)


@devices
@pytest.mark.usefixtures("poisoned")
@forms
@pytest.mark.parametrize("rows", [1, 7, 16, 30, 64, 65])
def test_products(form: str, rows: int, device: str) -> None:
    """Full panels and parts of one, an odd number of runs of columns, and parts of a run."""
    for outputs, columns in ((128, 256), (200, 384), (72, 1664)):
        codes = random_codes(form, outputs, columns, seed=rows)
        tokens, bias = random_tokens(rows, columns, seed=outputs), torch.randn(outputs)
        weight = packing.pack(codes)
        for dtype in dtypes(device):
            got = product(tokens, weight, bias, dtype, device)
            assert torch.equal(got, defined(tokens, weight, bias, dtype))
        assert torch.equal(product(tokens, weight, None, dtype, device), defined(tokens, weight, None, dtype))


@devices
@pytest.mark.parametrize("form", ["channel", "bytes", "group 32", "group 64"])
@pytest.mark.parametrize("outputs", [1, 30, 67])
def test_products_of_odd_shapes(form: str, outputs: int, device: str) -> None:
    for columns in (32, 96, 160, 224) if form != "group 64" else (64, 192, 320):
        codes, tokens = random_codes(form, outputs, columns), random_tokens(3, columns)
        weight = packing.pack(codes)
        got = product(tokens, weight, None, torch.bfloat16, device)
        assert torch.equal(got, defined(tokens, weight, None, torch.bfloat16))


@devices
def test_sums_that_fill_32_bits(device: str) -> None:
    """The largest values, and as many columns as there may be."""
    codes = random_codes("bytes", 3, 65536)
    codes.values[:2] = torch.tensor([[127], [-128]], dtype=torch.int8)
    values = torch.full((2, 65536), 127, dtype=torch.int8)
    values[1] = -127
    tokens = Tokens(values, torch.ones(2), values.sum(-1, dtype=torch.int32))
    weight = packing.pack(codes)
    got = product(tokens, weight, None, torch.bfloat16, device)
    assert torch.equal(got, defined(tokens, weight, None, torch.bfloat16))


def hard_rows(columns: int, dtype: torch.dtype, made: torch.Generator) -> Tensor:
    """Nine rows that lie apart: some of nothing, of what is no number, and of very small ones."""
    x = (torch.randn(9, 2 * columns, generator=made) * 3).to(dtype)[:, :columns]
    x[1], x[2, 5], x[3, 31], x[4, 0] = 0, torch.nan, torch.inf, -torch.inf
    x[5] *= 1e-6
    if dtype != torch.float16:
        x[6] = 2.0**-101
    return x


def assert_bits(got: Tokens, expected: Tokens) -> None:
    """Of tokens that may hold NaN; `got` on any device."""
    for field in ("values", "scale", "sums"):
        mine, theirs = getattr(got, field).cpu(), getattr(expected, field)
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


@devices
@pytest.mark.parametrize("columns", [32, 72, 576, 4096, 16392])
def test_tokens(columns: int, device: str) -> None:
    need(device)
    made = torch.Generator().manual_seed(columns)
    for dtype in dtypes(device):
        x = hard_rows(columns, dtype, made)
        with use_backend("compiled"):
            got = linear.quantize_tokens(x.to(device))
        with use_backend("reference"):
            expected = linear.quantize_tokens(x)
        assert_bits(got, expected)


@devices
def test_all_sizes(device: str) -> None:
    """Of the largest of a row, that 16 bits hold."""
    need(device)
    for dtype in SIXTEEN:
        size = torch.arange(1 << 15).to(torch.int16).view(dtype)
        x = size[torch.isfinite(size)][:, None] * torch.tensor([1, -0.3, 0.77, 0.1, 0, -1, 0.013, 0.5], dtype=dtype)
        with use_backend("compiled"):
            got = linear.quantize_tokens(x.to(device))
        with use_backend("reference"):
            assert_bits(got, linear.quantize_tokens(x))


def assert_same(got: Tokens, expected: Tokens) -> None:
    assert all(torch.equal(getattr(got, name), getattr(expected, name)) for name in ("values", "scale", "sums"))


def assert_near(got: Tokens, expected: Tokens, ulp: float) -> None:
    """But for a rounding of what was quantized."""
    torch.testing.assert_close(got.scale.cpu(), expected.scale, rtol=2 * ulp, atol=0)
    assert int((got.values.cpu().int() - expected.values.int()).abs().max()) <= 1
    assert float((got.values.cpu() != expected.values).float().mean()) < 0.05
    assert torch.equal(got.sums, got.values.sum(-1, dtype=torch.int32))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("columns", [64, 4096, 14336])
def test_tokens_out_of_a_norm_and_a_gate(columns: int, dtype: torch.dtype) -> None:
    """The very bits of the launches that they are in place of; of few rows, and of many."""
    need("cuda")
    made = torch.Generator().manual_seed(columns)
    for rows in (17, 600, 2048):
        x, up = (torch.randn(rows, columns, generator=made).to(dtype).cuda() for _ in range(2))
        both, ulp = torch.cat([x, up], 1), torch.finfo(dtype).eps
        for early, offset in ((True, 0.0), (False, 1.0)):
            with use_backend("compiled"):
                normed, got = linear.quantize_norm(x, up[0], 1e-5, offset, early)
                assert torch.equal(normed, ops.rms_norm(x, up[0], 1e-5, offset, early))
                assert_same(got, linear.quantize_tokens(normed))
            with use_backend("reference"):
                assert_near(got, linear.quantize_norm(x.cpu(), up[0].cpu(), 1e-5, offset, early)[1], ulp)
        with use_backend("compiled"):
            assert_same(linear.quantize_gated(*both.chunk(2, 1)), linear.quantize_tokens(silu(x) * up))


@pytest.mark.cuda
@pytest.mark.usefixtures("poisoned")
@forms
@pytest.mark.parametrize("rows", [3, 40, 64, 66, 128, 200, 256, 300, 600, 2100])
def test_many_tokens(form: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of a group of warps; tiles that are split, and that are not; parts of a run of columns."""
    monkeypatch.setattr(compiled, "FEW", 0)
    for outputs, columns in ((128, 256), (200, 640), (4160, 1152), (36, 128 if form == "group 128" else 192)):
        codes = random_codes(form, outputs, columns, seed=rows)
        tokens, bias = random_tokens(rows, columns, seed=outputs), torch.randn(outputs)
        weight = packing.pack(codes)
        got = product(tokens, weight, bias, torch.bfloat16, "cuda")
        with use_backend("reference"):
            on_cuda = linear.w4a8_linear(moved(tokens, "cuda"), moved(weight, "cuda"), bias.cuda(), torch.bfloat16)
        assert torch.equal(got, on_cuda.cpu())


def stored_weight(form: str, rows: int, columns: int) -> PackedWeight:
    """Any bytes, as they lie on the GPU; both levels stay within int8."""
    made = torch.Generator("cuda").manual_seed(rows + columns)
    full = -(-rows // linear.ROWS) * linear.ROWS
    size = columns if form == "bytes" else columns // 2
    codes = torch.randint(0, 256, (full, size), dtype=torch.uint8, device="cuda", generator=made)
    scale, groups = torch.rand(rows, device="cuda", generator=made) * 1e-2, None
    if form == "group 128":
        shape = (full // linear.ROWS, columns // 128, linear.ROWS, 2)
        groups = torch.randint(1, 16, shape, dtype=torch.uint8, device="cuda", generator=made)
        groups[..., 1] = 128 - groups[..., 0] * 7
    return PackedWeight(codes, scale, 7 * scale if form == "channel" else None, groups, columns)


@pytest.mark.cuda
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("form", ["channel", "group 128", "bytes"])
@pytest.mark.parametrize("planned", PLANNED)
def test_each_way_to_share_tiles(form: str, planned: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, so that they overlap; the last tile has rows that are not there."""
    need("cuda")
    monkeypatch.setattr(compiled, "FEW", 0)
    rows, panels, steps, *_ = planned
    weight = stored_weight(form, panels * 64 - 30, steps * 128)
    tokens = [moved(random_tokens(rows, steps * 128, seed), "cuda") for seed in range(2)]
    with use_backend("reference"):
        expected = [linear.w4a8_linear(each, weight, None, torch.bfloat16) for each in tokens]
    for _ in range(3):
        with use_backend("compiled"):
            got = [linear.w4a8_linear(each, weight, None, torch.bfloat16) for each in tokens]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_which_tiles_are_split(tmp_path: Path) -> None:
    """On 132 multiprocessors; a last round is split whole, or not at all, and clusters take one round."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ on the PATH")
    shapes = [
        (m, n, k) for m in (1, 16, 17, 64, 65, 256, 400, 2048, 8192) for n in (1, 33, 96, 448) for k in (1, 9, 32, 112)
    ]
    shapes += [planned[:3] for planned in PLANNED] + [(m, 64, 112) for m in (64, 256)]
    code = """
#include <cstdio>
#include "linear_plan.h"
int main() {
  int tokens, panels, steps;
  while (std::scanf("%d %d %d", &tokens, &panels, &steps) == 3) {
    const hfl::ManyPlan plan = hfl::plan_many(tokens, panels, steps, 132);
    std::printf("%d %d %d %d\\n", plan.tokens, plan.split_tiles, plan.shares, plan.panels);
  }
}
"""
    folder = Path(__file__).parents[2] / "csrc" / "cuda"
    command = [compiler, "-std=c++17", "-I", str(folder), "-x", "c++", "-", "-o", str(tmp_path / "plan")]
    subprocess.run(command, input=code, text=True, check=True)
    asked = "\n".join(" ".join(map(str, shape)) for shape in shapes)
    said = subprocess.run([str(tmp_path / "plan")], input=asked, capture_output=True, text=True, check=True).stdout
    found = {}
    for (tokens, panels, steps), line in zip(shapes, said.splitlines(), strict=True):
        tile, split, shares, of_rows = map(int, line.split())
        tiles = -(-tokens // tile) * -(-panels // (of_rows or 2))
        assert bool(of_rows) == (tokens <= 256)
        alone = {(16, 4), (64, 4), (128, 4), (128, 0), (256, 0)}
        assert (tile, of_rows) in ({(16, 1), (64, 1), (64, 2), (128, 2), (16, 4), (64, 4)} if shares else alone)
        assert (tile == 16) == (tokens <= 16)
        assert split in ((0,) if of_rows else (0, tiles % 132))
        assert shares in (0, 1, 2)
        assert shares <= steps  # no block is without a step
        if shares and of_rows == 4:
            assert (tokens <= tile, 132 <= panels <= 66 * 8, shares) == (True, True, 2)
        else:
            assert tiles * shares <= 132
        found[tokens, panels, steps] = tile, split, shares, of_rows
    assert [found[planned[:3]] for planned in PLANNED] == [planned[3:] for planned in PLANNED]
    assert found[8192, 448, 32] == (256, 0, 0, 0)
    assert [found[m, 448, 32] for m in (64, 256)] == [(64, 0, 2, 4), (128, 0, 0, 4)]
    assert [found[m, 64, 112] for m in (64, 256)] == [(64, 0, 2, 1), (128, 0, 2, 2)]


@devices
@forms
@pytest.mark.parametrize("rows", [1, 5, 12, 20])
def test_several_weights(form: str, rows: int, device: str) -> None:
    """Parts of panels, one after the other, with and without a bias; each as it is alone."""
    need(device)
    columns = 384
    tokens = moved(random_tokens(rows, columns), device)
    for sizes in ((200, 64, 72), (48, 4160), (30,), (64, 30, 128, 16)):
        weights = [moved(packing.pack(random_codes(form, n, columns, n)), device) for n in sizes]
        biases = [torch.randn(n, device=device) if n % 3 else None for n in sizes]
        with use_backend("compiled"):
            got = linear.w4a8_linears(tokens, weights, biases, torch.bfloat16)
        for out, weight, bias in zip(got, weights, biases, strict=True):
            assert torch.equal(out, defined(tokens, weight, bias, torch.bfloat16))


def drawn_rows(rows: int, columns: int, dtype: torch.dtype) -> list[Tensor]:
    """Such as there are, nothing but zeros, too small for a scale, and what is no number."""
    torch.manual_seed(columns)
    x = torch.randn(rows, columns).to(dtype)
    lost, spiked = x.clone(), x.clone()
    lost[0, columns // 2], spiked[0, -1] = float("inf"), 1000.0
    return [x, torch.zeros_like(x), x * 1e-35, lost, spiked]


@devices
@forms
@pytest.mark.parametrize("columns", [128, 224, 640, 1664, 4096, 4160])
def test_rows_that_are_quantized_in_the_launch(form: str, columns: int, device: str) -> None:
    """And, on CUDA, a gate with what it is multiplied with; of one weight and of several."""
    need(device)
    columns = columns // 128 * 128 if form == "group 128" else columns // 64 * 64 if form == "group 64" else columns
    weights = [moved(packing.pack(random_codes(form, n, columns, n)), device) for n in (72, 200, 16, 64)]
    biases = [None, torch.randn(200, device=device), None, None]
    for rows, dtype in ((1, torch.bfloat16), (1, torch.float16), (3, torch.bfloat16)):
        for x in drawn_rows(rows, columns, dtype):
            gated = [torch.randn(rows, columns).to(device, dtype)] if device == "cuda" else []
            for up in (None, *gated):
                with use_backend("reference"):
                    expected = linear.w4a8_linears_of(x.to(device), up, weights, biases)
                with use_backend("compiled"):
                    got = linear.w4a8_linears_of(x.to(device), up, weights, biases)
                for a, b in zip(got, expected, strict=True):
                    assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 2, 16, 64])
@pytest.mark.parametrize("columns", [4096, 14336, 16384])
def test_few_rows_of_a_large_layer(columns: int, rows: int) -> None:
    """Often, one after the other, so that each begins while the one before still writes what it reads; in a graph."""
    need("cuda")
    there, back = stored(columns, 4096), stored(4096, columns)
    x = torch.randn(rows, 4096, device="cuda").bfloat16()

    def steps(of: Any) -> list[Tensor]:
        found = [x]
        for _ in range(4):
            y = of(found[-1], there)
            found += [y, of(y, back)]
        return found

    def alone(x: Tensor, weight: PackedWeight) -> Tensor:
        return linear.w4a8_linears(linear.quantize_tokens(x), [weight], [None], torch.bfloat16)[0]

    def together(x: Tensor, weight: PackedWeight) -> Tensor:
        return linear.w4a8_linears_of(x, None, [weight], [None])[0]

    assert linear.is_one_launch(x) == (rows == 1 and torch.cuda.get_device_capability()[0] >= 9)
    steps(together)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = steps(together)
    for seed in range(5):
        x.copy_(torch.randn(rows, 4096, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, steps(alone), strict=True))


@pytest.mark.cuda
@forms
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9])
def test_more_units_than_threads_that_write_results(rows: int, form: str) -> None:
    """Of 16 rows each, so many for a block that what belongs to a row is asked for once its thread has had another."""
    need("cuda")
    outputs = 16 * 33 * torch.cuda.get_device_properties(0).multi_processor_count + 5
    x = hard_rows(128, torch.bfloat16, torch.Generator().manual_seed(rows))[:rows].cuda()
    weight, bias = moved(packing.pack(random_codes(form, outputs, 128)), "cuda"), torch.randn(outputs, device="cuda")
    with use_backend("reference"):
        expected = linear.w4a8_linears_of(x, None, [weight], [bias])[0]
    got = [linear.w4a8_linears_of(x, None, [weight], [bias])[0] for _ in range(3)]
    assert all(torch.equal(each.nan_to_num(7.0), expected.nan_to_num(7.0)) for each in got)


@pytest.mark.cuda
@forms
def test_many_tokens_where_only_the_kernel_of_few_is(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch for every 64 of them."""
    monkeypatch.setattr(compiled, "FEW", 1 << 30)
    tokens, weight = random_tokens(150, 384), packing.pack(random_codes(form, 200, 384))
    assert torch.equal(
        product(tokens, weight, None, torch.float16, "cuda"), defined(tokens, weight, None, torch.float16)
    )


@pytest.mark.cuda
@forms
def test_the_shapes_of_a_large_layer(form: str) -> None:
    """Often enough for a race to show, and one after the other, so that they overlap."""
    need("cuda")
    weights = [moved(packing.pack(random_codes(form, n, 4096, n)), "cuda") for n in (6144, 4096)]
    for rows in (1, 2, 16, 17, 64, 256, 1024):
        tokens = [moved(random_tokens(rows, 4096, seed), "cuda") for seed in range(2)]
        with use_backend("reference"):
            expected = [linear.w4a8_linear(t, w, None, torch.bfloat16) for t in tokens for w in weights]
        for _ in range(5):
            with use_backend("compiled"):
                got = [linear.w4a8_linear(t, w, None, torch.bfloat16) for t in tokens for w in weights]
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), rows


def stored(outputs: int, columns: int) -> PackedWeight:
    """Any codes in stored order, with groups of 128."""
    panels, device = -(-outputs // 64), torch.device("cuda")
    codes = torch.randint(0, 256, (panels * 64, columns // 2), dtype=torch.uint8, device=device)
    groups = torch.randint(1, 9, (panels, columns // 128, 64, 2), dtype=torch.uint8, device=device)
    groups[..., 1] = 128 - groups[..., 0] * 7  # so that values fit into int8
    return PackedWeight(codes, torch.rand(outputs, device=device), None, groups, columns)


@pytest.mark.cuda
@pytest.mark.parametrize("columns", [128, 640, 4096, 14336])
@pytest.mark.parametrize("outputs", [2272, 4096, 4230, 9000])
def test_units_of_a_block(outputs: int, columns: int) -> None:
    """One after the other, whole panels apart or not, of one weight and of several; tokens that stay, or do not."""
    need("cuda")
    weights = [stored(n, columns) for n in (outputs, 80)]
    for rows in (1, 5, 9, 16):
        tokens = moved(random_tokens(rows, columns), "cuda")
        with use_backend("torch"):
            expected = [linear.w4a8_linear(tokens, w, None, torch.bfloat16) for w in weights]
        with use_backend("compiled"):
            alone = linear.w4a8_linear(tokens, weights[0], None, torch.bfloat16)
            got = linear.w4a8_linears(tokens, weights, [None, None], torch.bfloat16)
        assert torch.equal(alone, expected[0])
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 2, 16, 40])
def test_several_large_weights(rows: int) -> None:
    """Each by its own launch where there is more than one token."""
    need("cuda")
    weights, tokens = [stored(compiled.LARGE + n, 256) for n in (0, 70)], moved(random_tokens(rows, 256), "cuda")
    with use_backend("torch"):
        expected = [linear.w4a8_linear(tokens, w, None, torch.bfloat16) for w in weights]
    with use_backend("compiled"):
        got = [linear.w4a8_linears(tokens, weights, [None, None], torch.bfloat16) for _ in range(3)]
    assert all(torch.equal(a, b) for each in got for a, b in zip(each, expected, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [2, 16, 64, 200])
def test_counters_that_nobody_needs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a graph that is captured on another stream they would be filled in each call, and nothing begin before."""
    need("cuda")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("elsewhere they are needed")
    tokens, weight = moved(random_tokens(rows, 256), "cuda"), stored(128, 256)
    with use_backend("torch"):
        expected = linear.w4a8_linear(tokens, weight, None, torch.bfloat16)
    monkeypatch.delattr(library, "counters")
    with use_backend("compiled"):
        assert torch.equal(linear.w4a8_linear(tokens, weight, None, torch.bfloat16), expected)


@pytest.mark.cuda
@pytest.mark.parametrize("rows", [1, 40, 300])
def test_captured_calls_follow_their_input(rows: int) -> None:
    need("cuda")
    weight = moved(packing.pack(random_codes("group 128", 4096, 1024)), "cuda")
    down = moved(packing.pack(random_codes("channel", 1024, 2048)), "cuda")
    x, norm = torch.randn(rows, 1024, device="cuda").bfloat16(), torch.rand(1024, device="cuda").bfloat16()

    def layer() -> Tensor:
        wide = linear.w4a8_linear(linear.quantize_norm(x, norm, 1e-5, 0.0, True)[1], weight, None, torch.bfloat16)
        return linear.w4a8_linear(linear.quantize_gated(*wide.chunk(2, 1)), down, None, torch.bfloat16)

    layer()
    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    assert dispatch.last_used()["w4a8_linear"] == "compiled"
    for _ in range(3):
        x.mul_(-1.25)
        graph.replay()
        assert torch.equal(captured, layer())


@pytest.mark.cuda
def test_a_weight_that_was_just_written_is_read_as_it_is_now() -> None:
    """It is read ahead of what the stream does; not where that may still be under way."""
    need("cuda")
    tokens = moved(random_tokens(1, 4096), "cuda")
    weights = [moved(packing.pack(random_codes("channel", 8192, 4096, seed)), "cuda") for seed in (0, 1)]
    with use_backend("reference"):
        expected = [linear.w4a8_linear(tokens, w, None, torch.bfloat16) for w in weights]
    kept = [w.codes.clone() for w in weights]
    changed, noise = weights[0], torch.randn(4096, 4096, device="cuda")
    for weight, codes, result in zip(weights, kept, expected, strict=True):
        linear.w4a8_linear(tokens, changed, None, torch.bfloat16)
        noise @ noise
        changed.codes.copy_(codes)
        now = dataclasses.replace(weight, codes=changed.codes)
        assert torch.equal(linear.w4a8_linear(tokens, now, None, torch.bfloat16), result)
    for part in (now.scale, now.shift):
        noise @ noise
        part.mul_(2)
        made = torch.full((len(now.scale),), 3.0, device="cuda")  # of which nobody knows before
        got = linear.w4a8_linear(tokens, now, made, torch.bfloat16)
        with use_backend("reference"):
            assert torch.equal(got, linear.w4a8_linear(tokens, now, made, torch.bfloat16))


def test_when_a_weight_is_known() -> None:
    """Read before, at the same place, and not written to since."""
    for form in ("channel", "group 128"):
        weight = packing.pack(random_codes(form, 64, 128))
        assert [compiled._is_known(weight) for _ in range(3)] == [False, True, True]
        for part in (weight.codes, weight.groups, weight.scale, weight.shift):
            if part is None:
                continue
            part.add_(1)
            assert [compiled._is_known(weight) for _ in range(2)] == [False, True]
        assert not compiled._is_known(copy.deepcopy(weight))
        weight = dataclasses.replace(weight, scale=weight.scale.clone())
        assert [compiled._is_known(weight) for _ in range(2)] == [False, True]
    views = [dataclasses.replace(weight, codes=weight.codes.view(2, -1).view(weight.codes.shape)) for _ in range(3)]
    assert [compiled._is_known(each) for each in (weight, *views)] == [True] * 4
    views[0].codes.add_(1)
    assert [compiled._is_known(each) for each in views] == [False, True, True]
    with torch.inference_mode():
        uncounted = packing.pack(random_codes("channel", 64, 128))
        assert [compiled._is_known(uncounted) for _ in range(2)] == [False, False]


@devices
def test_what_it_does_not_take(device: str) -> None:
    need(device)
    tokens, weight = moved(random_tokens(2, 64), device), moved(packing.pack(random_codes("channel", 4, 64)), device)
    reject = compiled.reject_linear
    assert reject(tokens, weight, None, torch.bfloat16) is None
    assert "float16 or bfloat16" in str(reject(tokens, weight, None, torch.float64))
    assert "a bias in float32" in str(reject(tokens, weight, torch.zeros(4, device=device).half(), torch.bfloat16))
    empty = Tokens(tokens.values[:0], tokens.scale[:0], tokens.sums[:0])
    assert "no empty tensors" in str(reject(empty, weight, None, torch.bfloat16))
    apart = Tokens(tokens.values[:, :32], tokens.scale, tokens.sums)
    assert "contiguous" in str(reject(apart, weight, None, torch.bfloat16))


GOOD = {"tokens": 1, "rows": 64, "columns": 64, "bits": 4, "dtype": 2}
REFUSED: list[tuple[str, type[ctypes.Structure], dict[str, int], str]] = [
    ("linear", compiled.HflLinear, {**GOOD, "dtype": 7}, "expected .*float16 or bfloat16"),
    ("linear", compiled.HflLinear, {**GOOD, "rows": 0}, "expected no empty axis"),
    ("linear", compiled.HflLinear, {**GOOD, "columns": 48}, "expected a multiple of 32 columns"),
    ("linear", compiled.HflLinear, {**GOOD, "columns": 65568}, "expected a multiple of 32 columns, at most 65536"),
    ("linear", compiled.HflLinear, {**GOOD, "bits": 3}, "expected 4 or 8 bits"),
    ("linear", compiled.HflLinear, {**GOOD, "group": 48}, "expected groups"),
    ("linear", compiled.HflLinear, {**GOOD, "group": 64}, "expected groups"),
    ("quantize", compiled.HflQuantize, {"tokens": 1, "columns": 64, "dtype": 5}, "expected .*float16 or bfloat16"),
    ("quantize", compiled.HflQuantize, {"tokens": 0, "columns": 64, "dtype": 2}, "expected "),
]


@devices
@pytest.mark.parametrize(("op", "struct", "fields", "words"), REFUSED)
def test_the_library_looks_before_it_works(
    op: str, struct: type[ctypes.Structure], fields: dict[str, int], words: str, device: str
) -> None:
    need("cpu")
    if device == "cuda" and not library.about().startswith("CUDA"):
        pytest.skip("the library was built without CUDA")
    threads = (1,) if device == "cpu" else ()
    with pytest.raises(RuntimeError, match=f"hfl_{op}_{device}: .*{words}"):
        library.call(f"hfl_{op}_{device}", struct(**fields), *threads)
