"""Selectors, budgets, summaries, formats and placements as values: they refuse, describe and fold."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

import hf_longctx as lc
from hf_longctx.cache.kv_format import Int4KV, Int8KV
from hf_longctx.cache.placement import HostLRU
from hf_longctx.cache.positions import Clamped
from hf_longctx.plan import Selector
from hf_longctx.select.budgets import Mass, TopK
from hf_longctx.select.scorers import Antidiagonal, RepresentativeDot, RepresentativeShare, UpperBound
from hf_longctx.select.summaries import Means, MinMax, Representatives

BOUND, DOT, TILES = UpperBound(MinMax(16, 4)), RepresentativeDot(Representatives(16, 2)), Antidiagonal(16, 4)
ABSOLUTE, CLAMPED, KEEP_ALL = lc.Absolute(), Clamped(8), lc.KeepAll()

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (TopK, {"tokens": -16}, "TopK: expected tokens as a whole number >= 0; got -16."),
    (TopK, {"tokens": 16.0}, "TopK: expected tokens as a whole number >= 0; got 16.0."),
    (TopK, {"tokens": True}, "TopK: expected tokens as a whole number >= 0; got True."),
    (MinMax, {"block": 0}, "MinMax: expected block as a whole number >= 1; got 0."),
    (MinMax, {"block": 16.0}, "MinMax: expected block as a whole number >= 1; got 16.0."),
    (MinMax, {"block": 16, "sub": 0}, "MinMax: expected sub as a whole number >= 1; got 0."),
    (MinMax, {"block": 16, "sub": True}, "MinMax: expected sub as a whole number >= 1; got True."),
    (MinMax, {"block": 16, "sub": 4.0}, "MinMax: expected sub as a whole number >= 1; got 4.0."),
    (MinMax, {"block": 16, "sub": 5}, "MinMax: expected a block of whole logical pages; got block=16, sub=5."),
    (MinMax, {"block": 8, "sub": 16}, "MinMax: expected a block of whole logical pages; got block=8, sub=16."),
    (Means, {"sub": 0}, "Means: expected sub as a whole number >= 1; got 0."),
    (Means, {"block": 128.0}, "Means: expected block as a whole number >= 1; got 128.0."),
    (Means, {"block": 16, "sub": 5}, "Means: expected a block of whole runs of keys; got block=16, sub=5."),
    (Means, {"bits": 2}, "Means: expected bits of 4, 8 or None; got 2."),
    (Representatives, {"count": 0}, "Representatives: expected count as a whole number >= 1; got 0."),
    (Representatives, {"count": 4.0}, "Representatives: expected count as a whole number >= 1; got 4.0."),
    (Representatives, {"count": True}, "Representatives: expected count as a whole number >= 1; got True."),
    (Representatives, {"block": 128.0}, "Representatives: expected block as a whole number >= 1; got 128.0."),
    (Representatives, {"block": 4, "count": 5}, "expected a count between 1 and the block of 4; got 5."),
    (RepresentativeDot, {"q_block": 0}, "RepresentativeDot: expected q_block as a whole number >= 1; got 0."),
    (RepresentativeDot, {"q_block": 8.0}, "RepresentativeDot: expected q_block as a whole number >= 1; got 8.0."),
    (RepresentativeDot, {"q_block": True}, "RepresentativeDot: expected q_block as a whole number >= 1; got True."),
    (RepresentativeShare, {"q_block": 0}, "RepresentativeShare: expected q_block as a whole number >= 1; got 0."),
    (Antidiagonal, {"block": 0}, "Antidiagonal: expected block as a whole number >= 1; got 0."),
    (Antidiagonal, {"block": 128.0}, "Antidiagonal: expected block as a whole number >= 1; got 128.0."),
    (Antidiagonal, {"block": 16, "stride": 0}, "Antidiagonal: expected stride as a whole number >= 1; got 0."),
    (Antidiagonal, {"block": 16, "stride": 4.0}, "Antidiagonal: expected stride as a whole number >= 1; got 4.0."),
    (Antidiagonal, {"block": 16, "stride": True}, "Antidiagonal: expected stride as a whole number >= 1; got True."),
    (Antidiagonal, {"block": 16, "stride": 3}, "expected a stride that divides the block of 16; got 3."),
    (Mass, {"tau": 0}, "Mass: expected tau in (0, 1]; got 0."),
    (Mass, {"tau": 1.01}, "Mass: expected tau in (0, 1]; got 1.01."),
    (Mass, {"tau": float("nan")}, "Mass: expected tau in (0, 1]; got nan."),
    (Mass, {"tau": (0.5, -0.1)}, "Mass: expected tau in (0, 1]; got -0.1."),
    (Selector, {"sink": -1}, "Selector: expected sink as a whole number >= 0; got -1."),
    (Selector, {"sink": 1.5}, "Selector: expected sink as a whole number >= 0; got 1.5."),
    (Selector, {"local": 0}, "Selector: expected local as a whole number >= 1; got 0."),
    (Selector, {"refresh_every": 0}, "Selector: expected refresh_every as a whole number >= 1; got 0."),
    (Selector, {"refresh_every": True}, "Selector: expected refresh_every as a whole number >= 1; got True."),
    (Selector, {"share": "group"}, "Selector: expected share 'kv_head', 'q_head' or 'all'; got 'group'."),
    (Clamped, {"distance": 0}, "Clamped: expected distance as a whole number of tokens >= 1; got 0."),
    (Clamped, {"distance": 2.0}, "Clamped: expected distance as a whole number of tokens >= 1; got 2.0."),
    (HostLRU, {"resident_blocks": -1}, "HostLRU: expected resident_blocks as a whole number >= 0; got -1."),
    (HostLRU, {"resident_blocks": 2.0}, "HostLRU: expected resident_blocks as a whole number >= 0; got 2.0."),
    (HostLRU, {"ram": 0}, "HostLRU: expected ram as a number of bytes or like '32GiB'; got 0."),
    (HostLRU, {"ram": -5}, "HostLRU: expected ram as a number of bytes or like '32GiB'; got -5."),
    (HostLRU, {"ram": "much"}, "HostLRU: expected ram as a number of bytes or like '32GiB'; got 'much'."),
    (HostLRU, {"ram": "3PiB"}, "HostLRU: expected ram as a number of bytes or like '32GiB'; got '3PiB'."),
    (HostLRU, {"ram": True}, "HostLRU: expected ram as a number of bytes or like '32GiB'; got True."),
]


@pytest.mark.parametrize(("cls", "values", "message"), REFUSED, ids=[f"{c.__name__}-{v}" for c, v, _ in REFUSED])
def test_what_makes_no_sense_is_refused_by_name(cls: Any, values: dict[str, Any], message: str) -> None:
    needed = {"scorer": BOUND, "budget": TopK(16)} if cls is Selector else {}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        cls(**needed, **values)
    assert str(caught.value).endswith(".")
    assert str(caught.value) != message, "it says what to do"


DESCRIBED = [
    (MinMax(16, 16), "bounds of 16"),
    (MinMax(64, 16), "bounds of 64 in 16s"),
    (Representatives(128, 4), "4 representatives of 128"),
    (Means(128, 16), "8 means of 128"),
    (BOUND, "upper bound (bounds of 16 in 4s)"),
    (DOT, "2 representatives of 16"),
    (TILES, "antidiagonals (16, stride 4)"),
    (Antidiagonal(16, 4, "fp8"), "antidiagonals (16, stride 4, fp8)"),
    (TopK(4096), "the best 4096 tokens"),
    (Mass(0.9), "90% of attention"),
    (Mass((0.5, 0.9)), "50% to 90% of attention"),
    (Selector(BOUND, TopK(32)), "the best 32 tokens by upper bound (bounds of 16 in 4s)"),
    (
        Selector(BOUND, TopK(32), sink=4, local=64, share="q_head", refresh_every=4),
        "the best 32 tokens by upper bound (bounds of 16 in 4s) beside 4 sinks + 64 local, each query head for itself, "
        "chosen every 4 steps",
    ),
    (Selector(DOT, TopK(16), local=9, share="all"), "beside 9 local, one choice for all heads"),
    (CLAMPED, "positions of the text, at most 8 apart"),
    (Int8KV(), "KV int8"),
    (Int4KV(), "KV int4"),
    (HostLRU(32), "in host memory but for 32 blocks"),
    (HostLRU(8, ram="32GiB", disk="kv.bin"), "in a file but for 8 blocks (cap 32GiB)"),
]


@pytest.mark.parametrize(("value", "phrase"), DESCRIBED, ids=[type(v).__name__ for v, _ in DESCRIBED])
def test_values_describe_themselves(value: Any, phrase: str) -> None:
    assert value.describe().endswith(phrase)


def test_a_policy_describes_all_its_axes() -> None:
    retrieval = Selector(DOT, TopK(32), sink=16, local=64)
    both = lc.HeadPolicy(KEEP_ALL, CLAMPED, retrieval, retrieval, Int4KV(), HostLRU(8))
    assert both.describe() == (
        "keep all, positions of the text, at most 8 apart, reads the best 32 tokens by 2 representatives of 16 beside "
        "16 sinks + 64 local, KV int4, in host memory but for 8 blocks"
    )
    split = lc.HeadPolicy(KEEP_ALL, ABSOLUTE, Selector(TILES, Mass(0.9)), Selector(BOUND, TopK(32)))
    assert split.describe() == (
        "keep all, positions of the text, prefill reads 90% of attention by antidiagonals (16, stride 4), "
        "decode reads the best 32 tokens by upper bound (bounds of 16 in 4s)"
    )


def test_values_are_frozen_and_hashable() -> None:
    for value, _ in DESCRIBED:
        assert hash(value) == hash(replace(value))
        with pytest.raises(FrozenInstanceError):
            value.block = 3


@pytest.mark.parametrize(
    ("ram", "size"),
    [(None, None), (5, 5), ("5", 5), ("1KB", 1000), ("2MiB", 2 << 20), ("1.5 gib", 3 << 29), ("2T", 2 * 10**12)],
)
def test_sizes_are_read(ram: Any, size: int | None) -> None:
    assert HostLRU(ram=ram).ram_bytes == size


def test_blocks_that_hold_a_sink() -> None:
    assert [Selector(BOUND, TopK(16), sink=sink).sink_blocks for sink in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_shares_of_mass() -> None:
    assert Mass([0.5, 1]) == Mass((0.5, 1.0))
    assert (Mass(0.5).shares, Mass((0.5, 1)).shares) == ((0.5,), (0.5, 1.0))
    assert Mass().tokens is None


def test_bounds_of_keys_and_of_none() -> None:
    k = torch.tensor([[[1.0, -2], [3, 0], [-1, 5]], [[4.0, 4], [0, 9], [7, 7]]])
    assert MinMax(3, 3).fold(k, None, None).tolist() == [[[-1, -2], [3, 5]], [[0, 4], [7, 9]]]
    filled = torch.tensor([[True, True, False], [False, False, False]])
    inf = float("inf")
    assert MinMax(3, 3).fold(k, filled, None).tolist() == [[[1, -2], [3, 0]], [[inf, inf], [-inf, -inf]]]


def test_a_bound_is_a_bound() -> None:
    made = torch.Generator().manual_seed(0)
    k, q = (torch.randn(50, n, 8, generator=made, dtype=torch.float64) for n in (16, 3))
    least, largest = MinMax(16, 16).fold(k, None, None)[:, None].unbind(2)
    bound = torch.maximum(q * least, q * largest).sum(-1)
    assert bool((bound >= (q @ k.mT).amax(-1)).all())


def test_representatives_of_equal_mass_are_the_first() -> None:
    k = torch.tensor([[1.0, 0], [5, 0], [2, 0], [3, 8]])
    mass = torch.tensor([0.5, 0.2, 0.9, 0.5])
    means = [Representatives(4, count).fold(k, None, mass)[0].tolist() for count in (1, 2, 3, 4)]
    torch.testing.assert_close(torch.tensor(means), torch.tensor([[2, 0], [1.5, 0], [2, 8 / 3], [2.75, 2]]))
