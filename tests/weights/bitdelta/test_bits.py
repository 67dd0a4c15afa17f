"""Signs and scales against a literal reading of the paper and of the published layout."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longctx.weights.bitdelta.bits import Grain, compress, pack, restore, unpack
from hf_longctx.weights.bitdelta.digest import checksum, of_model, same_weight, weight_checksum


def test_words_written_out_by_hand() -> None:
    """Input 0 is the lowest bit; the sign of a weight that did not change is plus."""
    difference = torch.full((2, 64), -1.0)
    difference[0, 0] = difference[0, 4] = 2.0  # 2**0 + 2**4
    difference[0, 63] = 0.0  # the highest bit of the second word
    difference[1, 32:] = 1.0
    matrix = compress(difference.clone(), 1, Grain())
    assert matrix.bits.tolist() == [[[17, -(2**31)], [0, -1]]]
    assert matrix.scales.tolist() == [[[pytest.approx((2 + 2 + 61 + 64) / 128)]]]


@given(rows=st.integers(1, 5), words=st.integers(1, 4), seed=st.integers(0, 2**31))
@settings(max_examples=25)
def test_pack_is_the_literal_layout_and_unpack_its_inverse(rows: int, words: int, seed: int) -> None:
    signs = torch.rand(rows, 32 * words, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(signs)
    for n in range(rows):
        for w in range(words):
            word = sum(1 << b for b in range(32) if signs[n, 32 * w + b])
            assert packed[n, w].item() == (word if word < 2**31 else word - 2**32)
    assert torch.equal(unpack(packed), signs)


@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    planes=st.integers(1, 4),
    grain=st.sampled_from(["matrix", "row", "32", "64"]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_each_plane_is_the_sign_and_mean_of_what_is_left(
    rows: int, groups: int, planes: int, grain: str, seed: int
) -> None:
    difference = torch.randn(rows, 64 * groups, generator=torch.Generator().manual_seed(seed))
    matrix = compress(difference.clone(), planes, Grain.of(grain))
    left = difference.double()
    for _ in range(planes):
        size = {"matrix": None, "row": left.shape[1]}.get(grain, int(grain) if grain.isdigit() else None)
        mean = left.abs().mean() if size is None else left.abs().unflatten(1, (-1, size)).mean(-1)
        scale = mean if size is None else mean.repeat_interleave(size, 1)
        left = left - torch.where(left >= 0, scale, -scale)
    torch.testing.assert_close(restore(matrix).double(), difference.double() - left, atol=1e-5, rtol=0)


def test_more_bits_leave_less() -> None:
    difference = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    errors = [float((restore(compress(difference.clone(), p, Grain())) - difference).norm()) for p in (1, 2, 3, 4)]
    assert all(after < 0.8 * before for before, after in itertools.pairwise(errors))


def test_a_plane_with_nothing_to_say_is_left_out() -> None:
    assert compress(torch.full((2, 32), 0.5), 4, Grain()).bits.shape == (1, 2, 1)


@pytest.mark.parametrize("text", ["31", "33", "column", "0"])
def test_grains_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="grain: expected"):
        Grain.of(text)


@pytest.mark.parametrize(("planes", "inputs"), [(0, 32), (5, 32), (1, 48)])
def test_what_cannot_be_compressed(planes: int, inputs: int) -> None:
    with pytest.raises(ValueError, match="bits: expected"):
        compress(torch.ones(2, inputs), planes, Grain())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int8])
def test_a_checksum_sees_every_value_shape_and_order(dtype: torch.dtype) -> None:
    x = torch.arange(35).reshape(5, 7).to(dtype)
    known = {checksum(x), checksum(x.T), checksum(x.flip(0)), checksum(x.reshape(7, 5))}
    for place in range(35):
        other = x.flatten().clone()
        other[place] += 1
        known.add(checksum(other.reshape(5, 7)))
    assert len(known) == 39


def test_a_checksum_is_that_of_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole = checksum(x)
    monkeypatch.setattr("hf_longctx.weights.bitdelta.digest._CHUNK", 7)
    assert checksum(x) == whole


def test_a_base_is_known_in_16_and_32_bits() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for stored in (x, x.bfloat16(), x.half()):
        known = weight_checksum(stored)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert same_weight(stored.to(dtype), known)
            other = stored.to(dtype, copy=True)
            other[3, 4] *= 1.01
            assert not same_weight(other, known)
    assert of_model({"a": "1", "b": "2"}) == of_model({"b": "2", "a": "1"}) != of_model({"a": "2", "b": "1"})
