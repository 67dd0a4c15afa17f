"""Codes and what they stand for, against literal integers; and that the second level never leaves a signed byte."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longctx.weights.qoq.calibrate.hadamard import hadamard, rotation
from hf_longctx.weights.qoq.calibrate.rounding import fit, gptq, output_error
from hf_longctx.weights.qoq.config import QoQConfig
from hf_longctx.weights.qoq.grids import PROTECTED, bytes_grid, channel_grid, group_grid, nearest_grid, row_scale

CONFIGS = {"w8": QoQConfig(8), "channel": QoQConfig(4, -1), "group": QoQConfig(4, 32)}


def drawn(n: int, k: int, seed: int = 0) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=made)
    weight[:, 0] *= 9
    weight[0] = 0
    weight[1] = weight[1].abs()
    return weight


def inputs(tokens: int, k: int, seed: int = 1) -> torch.Tensor:
    made = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=made) / k**0.5
    return torch.randn(tokens, k, generator=made) @ mix * torch.rand(k, generator=made).mul(3).exp()


@pytest.mark.parametrize("shrink", [1.0, 0.7])
def test_channel_codes_are_the_nearest_of_sixteen(shrink: float) -> None:
    weight = drawn(8, 96)
    grid = channel_grid(weight, shrink)
    codes = grid.codes(weight)
    for n in range(8):
        low, high = (min(0.0, float(weight[n].min())) * shrink, max(0.0, float(weight[n].max())) * shrink)
        ladder = torch.tensor([low + (high - low) / 15 * i for i in range(16)])
        distance = (weight[n][:, None] - ladder).abs()
        best = distance.min(1).values
        assert (distance[torch.arange(96), codes[n].long()] - best).max() <= 1e-5 * float(weight[n].abs().max())
    assert codes.min() == 0
    assert codes.max() == 15
    assert torch.equal(grid.values(codes)[0], torch.zeros(96))


def test_byte_codes_are_symmetric() -> None:
    weight = drawn(8, 96)
    grid = bytes_grid(weight)
    codes = grid.codes(weight)
    assert codes[1:].abs().amax(1).eq(127).all()
    assert (grid.values(codes) - weight).abs().max() <= grid.scale.max() / 2 * 1.001


def test_every_range_of_a_group_stays_within_a_signed_byte() -> None:
    ends = torch.arange(-PROTECTED, PROTECTED + 1, 3)
    low, high = torch.cartesian_prod(ends[ends <= 0], ends[ends >= 0]).T
    weight = torch.stack((low, high, low / 3, high / 3), 1).float()
    for shrink in (1.0, 0.5):
        grid = group_grid(weight, torch.ones(len(weight)), 4, shrink)
        assert grid.steps is not None
        assert grid.zeros is not None
        worst = torch.stack((grid.zeros, grid.high.int() * grid.steps + grid.zeros))
        assert worst.min() >= -128
        assert worst.max() <= 127
        assert grid.steps.min() >= 1
        assert grid.steps.max() <= 16
        if shrink == 1.0:
            codes = grid.codes(weight)
            assert (grid.values(codes) - weight).abs().max() <= 8.5


@settings(max_examples=25)
@given(seed=st.integers(0, 2**16), group=st.sampled_from([8, 16]), scale=st.sampled_from([1e-4, 1.0, 300.0]))
def test_group_values_are_whole_multiples_of_the_row_scale(seed: int, group: int, scale: float) -> None:
    weight = drawn(6, 48, seed) * scale
    grid = group_grid(weight, row_scale(weight), group)
    codes = grid.codes(weight)
    assert grid.steps is not None
    assert grid.zeros is not None
    for n in range(6):
        for k in range(48):
            whole = int(codes[n, k]) * int(grid.steps[n, k // group]) + int(grid.zeros[n, k // group])
            assert -128 <= whole <= 127
            assert float(grid.values(codes)[n, k]) == pytest.approx(
                whole * float(grid.scale[n]), rel=1e-5, abs=1e-4 * float(grid.scale[n])
            )
            reach = (float(grid.steps[n, k // group]) / 2 + 0.5) * float(grid.scale[n])
            assert abs(whole * float(grid.scale[n]) - float(weight[n, k])) <= reach * 1.001 + 1e-9


@pytest.mark.parametrize("order", [1, 2, 12, 20, 28, 36, 60, 64, 68, 576, 1536])
def test_hadamard_is_orthogonal_and_flat(order: int) -> None:
    matrix = hadamard(order)
    assert torch.allclose(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix.abs() * order**0.5, torch.ones_like(matrix), atol=1e-12)
    turned = rotation(order, 3)
    assert torch.allclose(turned.T @ turned, torch.eye(order, dtype=torch.float64), atol=1e-12)
    assert torch.equal(turned, rotation(order, 3))


def test_an_order_without_a_matrix_is_rotated_in_blocks() -> None:
    matrix = hadamard(92)
    assert torch.allclose(matrix @ matrix.T, torch.eye(92, dtype=torch.float64), atol=1e-12)
    assert matrix[:4, 4:].abs().max() == 0


@pytest.mark.parametrize("kind", ["w8", "channel", "group"])
def test_each_step_lowers_the_error_of_the_output(kind: str) -> None:
    weight, x = drawn(24, 64), inputs(300, 64)
    moments = x.T @ x / len(x)

    def error(codes: torch.Tensor, grid: object) -> torch.Tensor:
        change = grid.values(codes) - weight  # type: ignore[attr-defined]
        direct = (x @ change.T).square().mean(0)
        assert torch.allclose(direct, output_error(change, moments), rtol=1e-3, atol=1e-6 * float(direct.max() + 1))
        return direct

    config = CONFIGS[kind]
    plain, searched = nearest_grid(weight, config), fit(weight, config, moments)
    rounded = error(plain.codes(weight), plain)
    clipped = error(searched.codes(weight), searched)
    spread = error(gptq(weight, searched, moments), searched)
    if kind != "group":  # of groups, each is searched by itself
        assert (clipped <= rounded * 1.001 + 1e-9).all()
    assert clipped.sum() < rounded.sum()
    assert (spread <= clipped * 1.001 + 1e-9).all()
    assert spread.sum() < 0.8 * clipped.sum()
    codes = gptq(weight, searched, moments)
    assert torch.equal(codes, codes.round())
    assert codes.min() >= searched.low
    assert (codes <= searched.spread(64)[2]).all()


def test_gptq_refuses_what_is_not_finite() -> None:
    weight = drawn(4, 8)
    moments = torch.eye(8)
    moments[2, 2] = torch.nan
    with pytest.raises(RuntimeError, match="finite inputs"):
        gptq(weight, channel_grid(weight), moments)
