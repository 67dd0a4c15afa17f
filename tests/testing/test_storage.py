"""What few bits make of keys and values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longctx.cache.positions import lap_position
from hf_longctx.testing.storage import keys_read_back, read_back, stored_positions

from .scenes import unturned


@pytest.mark.parametrize("bits", [4, 8])
@settings(max_examples=100)
@given(st.integers(0, 99), st.sampled_from([1e-3, 1.0, 300.0]), st.sampled_from([0.0, 1.0, 30.0]))
def test_errors_stay_below_half_a_step(bits: int, seed: int, size: float, offset: float) -> None:
    made = torch.Generator().manual_seed(seed)
    x = size * (torch.randn(20, 8, generator=made, dtype=torch.float64) + offset)
    step = torch.maximum((x.amax(-1) - x.amin(-1)) / (2**bits - 1), x.abs().amax(-1) / 2048).clamp(min=2.0**-14)
    # half a step, of a step that float16 rounds, times as many steps as zero is away, itself rounded
    allowed = step * (0.5 + 2.0**-11 * (2**bits + 2 * x.abs().amax(-1) / step))
    assert bool(((read_back(x, bits) - x).abs().amax(-1) <= allowed).all())


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_of_nearly_one_value_have_a_least_step(bits: int) -> None:
    low, high = read_back(torch.tensor([100.0, 100.03], dtype=torch.float64), bits).tolist()
    assert high - low == pytest.approx(float(torch.tensor(100.03 / 2048).half()))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.3, -700.0, 60000.0])
def test_rows_of_one_value_keep_it(bits: int, value: float) -> None:
    x = torch.full((8,), value, dtype=torch.float64)
    torch.testing.assert_close(read_back(x, bits), x, rtol=1e-3, atol=0)


def test_whole_steps_are_exact() -> None:
    """Scale and zero are small numbers here, which float16 holds."""
    steps = torch.tensor([-3.0, 0, 5, 12], dtype=torch.float64)
    assert read_back(steps / 4, 4).tolist() == [-0.75, 0, 1.25, 3]
    between = torch.tensor([-0.75, 0.1, 0.2, 3], dtype=torch.float64)
    assert read_back(between, 4).tolist() == [-0.75, 0, 0.25, 3]
    assert read_back(torch.tensor([-1.0, 0.004, 0.03, 254]), 8).tolist() == [-1, 0, 0, 254]


def test_scale_and_zero_are_rounded_to_float16() -> None:
    x = torch.tensor([-0.1, 1.0], dtype=torch.float64)
    scale = float(torch.tensor(1.1 / 15).half())
    zero = float(torch.tensor(0.1 / scale).half())
    assert (scale, zero) != (1.1 / 15, 0.1 / scale)
    assert read_back(x, 4).tolist() == [(round(v / scale + zero) - zero) * scale for v in (-0.1, 1.0)]


@given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 60))
def test_stored_positions_go_round_in_laps(sink: int, lap: int, tokens: int) -> None:
    text = torch.arange(tokens)
    assert torch.equal(stored_positions(tokens, sink, None), text)
    assert torch.equal(stored_positions(tokens, sink, lap), lap_position(text, sink, lap))


def test_keys_are_quantized_as_they_are_rotated() -> None:
    def doubled(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """A turn whose effect on a step can be read off: twice as large at every position, half as large back."""
        return x * 2.0 ** at[..., None]

    k = torch.tensor([[[-3.0, 0, 5.2, 12], [-3.0, 0, 5.2, 12]]], dtype=torch.float64)
    assert keys_read_back(k, 4, torch.tensor([0, 3]), doubled).tolist() == [[[-3, 0, 5, 12]] * 2]
    assert torch.equal(keys_read_back(k, 8, torch.tensor([0, 3]), unturned), read_back(k, 8))

    def shifted(x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return x + at[..., None] * torch.tensor([0, 0.4, 0.2, 0])

    got = keys_read_back(k, 4, torch.tensor([0, 1]), shifted)
    torch.testing.assert_close(got, torch.tensor([[[-3, 0, 5, 12], [-3, -0.4, 4.8, 12]]], dtype=torch.float64))
