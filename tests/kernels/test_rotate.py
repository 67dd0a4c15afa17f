"""Rotation: by definition, back and forth, one after the other, in halves and in pairs, partly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hf_longctx.kernels import ops

EPS = torch.finfo(torch.float64).eps


@st.composite
def turnings(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, bool]:
    """x, delta, inv_freq, interleaved."""
    rows, heads, tokens, dim = (draw(st.integers(1, n)) for n in (3, 3, 9, 12))
    rotated = draw(st.integers(0, dim // 2))
    made = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(rows, heads, tokens, dim, generator=made, dtype=torch.float64)
    delta = torch.randint(-50, 50, (draw(st.sampled_from([1, rows])), tokens), generator=made)
    return x, delta, torch.rand(rotated, generator=made), draw(st.booleans())


@given(turnings())
def test_definition(turning: tuple[Tensor, Tensor, Tensor, bool]) -> None:
    x, delta, inv_freq, interleaved = turning
    expected = x.clone()
    for row in range(x.shape[0]):
        for t in range(x.shape[2]):
            for i, frequency in enumerate(inv_freq.tolist()):
                a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + len(inv_freq))
                angle = int(delta[row % len(delta), t]) * frequency
                cos, sin = math.cos(angle), math.sin(angle)
                expected[row, :, t, a] = x[row, :, t, a] * cos - x[row, :, t, b] * sin
                expected[row, :, t, b] = x[row, :, t, b] * cos + x[row, :, t, a] * sin
    got = ops.rotate(x, delta, inv_freq, interleaved)
    torch.testing.assert_close(got, expected, atol=60 * EPS, rtol=0)  # angles below 50, |x| below 5


@given(turnings())
def test_back_and_forth(turning: tuple[Tensor, Tensor, Tensor, bool]) -> None:
    x, delta, inv_freq, interleaved = turning
    there = ops.rotate(x, delta, inv_freq, interleaved)
    torch.testing.assert_close(ops.rotate(there, -delta, inv_freq, interleaved), x, atol=16 * EPS, rtol=0)
    torch.testing.assert_close(there.norm(dim=-1), x.norm(dim=-1), atol=16 * EPS, rtol=0)


@given(turnings(), st.integers(-50, 50))
def test_two_turns_are_one(turning: tuple[Tensor, Tensor, Tensor, bool], more: int) -> None:
    x, delta, inv_freq, interleaved = turning
    twice = ops.rotate(ops.rotate(x, delta, inv_freq, interleaved), torch.full_like(delta, more), inv_freq, interleaved)
    once = ops.rotate(x, delta + more, inv_freq, interleaved)
    torch.testing.assert_close(twice, once, atol=600 * EPS, rtol=0)  # three angles below 100, |x| below 5


def test_pairs_are_halves_in_another_order() -> None:
    x, delta, inv_freq = torch.randn(1, 2, 5, 8), torch.arange(5)[None], torch.rand(3)
    order = torch.tensor([0, 2, 4, 1, 3, 5, 6, 7])  # channels 6 and 7 are not rotated
    pairs = ops.rotate(x, delta, inv_freq, True)
    assert torch.equal(pairs[..., order], ops.rotate(x[..., order], delta, inv_freq, False))
    assert torch.equal(pairs[..., 6:], x[..., 6:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x, delta, inv_freq = torch.randn(2, 3, 40, 16).to(dtype), torch.arange(40)[None], torch.rand(8)
    got, exact = (ops.rotate(y, delta, inv_freq, False) for y in (x, x.double()))
    assert got.dtype == dtype
    angles = 40 * torch.finfo(torch.float32).eps * float(x.abs().max())  # of angles in float32
    assert float((got.double() - exact).abs().max()) <= torch.finfo(dtype).eps / 2 * float(exact.abs().max()) + angles
