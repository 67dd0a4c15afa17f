"""What hypothesis draws for streams, and when logits count as equal."""

from __future__ import annotations

import itertools

import torch
from hypothesis import strategies as st
from torch import Tensor

from hf_longctx.testing import rounding


@st.composite
def calls(draw: st.DrawFn, total: int) -> list[int]:
    """Sizes of calls that add up to `total`: all at once, one by one, or anything between."""
    if draw(st.booleans()):
        most = draw(st.sampled_from([1, 3, total]))
        return [min(most, total - start) for start in range(0, total, most)]
    cuts = draw(st.sets(st.integers(1, max(1, total - 1)), max_size=8))
    edges = [0, *sorted(c for c in cuts if c < total), total]
    return [b - a for a, b in itertools.pairwise(edges)]


@st.composite
def padding(draw: st.DrawFn, total: int) -> Tensor | None:
    """A mask `[B, total]` with left padding that leaves each row at least one token, or None (one row, no padding)."""
    pads = draw(st.lists(st.integers(0, total - 1), max_size=3))
    if not pads:
        return None
    return (torch.arange(total) >= torch.tensor(pads)[:, None]).long()


def tokens(rows: int, total: int, seed: int, vocabulary: int = 64) -> Tensor:
    """Random token ids `[rows, total]`."""
    made = torch.Generator().manual_seed(seed)
    return torch.randint(8, vocabulary, (rows, total), generator=made)


def assert_equal(
    model: torch.nn.Module,
    got: Tensor,
    oracle: Tensor,
    keys: int,
    mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Logits agree wherever there is a token, to what `dtype` may round; gives the relative error."""
    real = slice(None) if mask is None else mask.bool()
    got, oracle = got[real].double(), oracle[real]
    error = float((got - oracle).abs().max() / oracle.abs().max())
    allowed = rounding(model, keys, dtype)  # type: ignore[arg-type]
    assert error <= allowed, f"relative error {error:.2e} exceeds {allowed:.2e}"
    return error
