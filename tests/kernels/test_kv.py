"""Quantized keys and values: by definition, bit for bit; errors within half a step; rows that are hard to quantize."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_longctx.kernels import ops

FEW = settings(max_examples=40)


def half(x: float) -> float:
    """Rounded to float16, by way of float32, as torch does."""
    (single,) = struct.unpack("f", struct.pack("f", x))
    return float(struct.unpack("e", struct.pack("e", single))[0])


def encoded(row: list[float], bits: int) -> tuple[list[int], float, float]:
    """Payload of each channel, scale and zero of one token."""
    steps = 2**bits - 1
    floor = max(max(abs(x) for x in row) / 2048, 2**-14)
    scale = half(max((max(row) - min(row)) / steps, floor))
    zero = half(-min(row) / scale)
    return [min(max(round(x / scale + zero), 0), steps) for x in row], scale, zero


@st.composite
def rows(draw: st.DrawFn) -> Tensor:
    """`[B, H, T, D]`, float64: of different sizes and far from zero, D even."""
    shape = [draw(st.integers(1, n)) for n in (3, 3, 6)] + [2 * draw(st.integers(1, 6))]
    made = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    size, offset = 10.0 ** draw(st.integers(-6, 3)), draw(st.sampled_from([0.0, 1.0, -30.0, 3000.0]))
    return torch.randn(shape, generator=made, dtype=torch.float64) * size + offset


@FEW
@given(rows(), st.sampled_from([4, 8]))
def test_definition(x: Tensor, bits: int) -> None:
    packed = ops.encode_kv(x, bits)
    assert packed.shape == x.shape
    assert (packed.payload.dtype, packed.scale.dtype, packed.zero.dtype) == (torch.uint8, torch.float16, torch.float16)
    back = ops.decode_kv(packed)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:3])).view(-1, 3).tolist():
        index = tuple(at)
        payload, scale, zero = encoded(x[index].tolist(), bits)
        as_bytes = payload if bits == 8 else [a + 16 * b for a, b in zip(payload[::2], payload[1::2], strict=True)]
        assert packed.payload[index].tolist() == as_bytes
        assert (float(packed.scale[index]), float(packed.zero[index])) == (scale, zero)
        expected = torch.tensor([(p - zero) * scale for p in payload], dtype=torch.float64)
        torch.testing.assert_close(back[index], expected, rtol=2.0**-22, atol=0)  # two roundings to float32


@FEW
@given(rows(), st.sampled_from([4, 8]))
def test_errors_are_half_a_step_and_the_rounding_of_zero_and_scale(x: Tensor, bits: int) -> None:
    packed = ops.encode_kv(x, bits)
    scale, zero = packed.scale.double()[..., None], packed.zero.double()[..., None]
    of_zero = zero.abs() * 2.0**-11 + 2.0**-25
    of_scale = (2**bits - 1) * 2.0**-11
    allowed = scale * torch.clamp(of_zero + of_scale, min=0.5)
    error = (ops.decode_kv(packed) - x).abs()
    assert (error <= allowed + x.abs() * 2.0**-22).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 100.0, -3e4, 1e-3, 1e-7])
def test_equal_values_keep_their_value(value: float, bits: int) -> None:
    x = torch.full((1, 2, 3, 8), value)
    error = float((ops.decode_kv(ops.encode_kv(x, bits)) - x).abs().max())
    assert error <= abs(value) / 1000 + 2.0**-15
    assert error == 0 or value != 0


@pytest.mark.parametrize("bits", [4, 8])
def test_nearly_equal_values_keep_their_value(bits: int) -> None:
    made = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(2, 2, 50, 16, generator=made) * 10.0 ** torch.arange(-5, 0).repeat(10)[:, None]
    assert float(((ops.decode_kv(ops.encode_kv(x, bits)) - x).abs() / x).max()) <= 1 / 1000


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, bits: int) -> None:
    x = torch.randn(2, 2, 5, 16).to(dtype)
    packed = ops.encode_kv(x, bits)
    assert packed.nbytes == 2 * 2 * 5 * (16 * bits // 8 + 4)
    back = ops.decode_kv(packed)
    assert back.dtype == dtype
    steps = (x.double().amax(-1) - x.double().amin(-1)) / (2**bits - 1)
    allowed = 0.75 * steps[..., None] + x.abs().double() * torch.finfo(dtype).eps
    assert ((back.double() - x.double()).abs() <= allowed).all()


def test_what_is_decoded_once_is_decoded_again_within_a_step() -> None:
    x = torch.randn(1, 2, 40, 32)
    once = ops.decode_kv(ops.encode_kv(x, 8))
    twice = ops.decode_kv(ops.encode_kv(once, 8))
    assert ((once - twice).abs() <= ops.encode_kv(x, 8).scale.float()[..., None]).all()
