"""Windows with gradients, all blocks of queries in one call: what they read, and that nothing is compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_longctx import use_backend
from hf_longctx.kernels import banded, dispatch, ops
from hf_longctx.kernels.ops import Logits, Visibility


def tensors(rows: int, kv_heads: int, group: int, tokens: int, dim: int, dtype: torch.dtype, device: str) -> Any:
    made = torch.Generator().manual_seed(tokens)
    heads = (kv_heads * group, kv_heads, kv_heads, kv_heads * group)
    shapes = [(rows, n, tokens, dim) for n in heads]
    return [torch.randn(shape, generator=made, dtype=torch.float64).to(device, dtype) for shape in shapes]


def results(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, see: Visibility) -> list[Tensor]:
    """The output and the gradients of queries, keys and values."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = ops.attend_blocks(*leaves, Logits(q.shape[3] ** -0.5), see, None)
    out.backward(weights)
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


@settings(max_examples=40)
@given(sink=st.integers(0, 200), window=st.integers(1, 1500), more=st.integers(1, 700))
def test_every_block_has_its_band_behind_the_sinks(sink: int, window: int, more: int) -> None:
    edge = banded.edge_of(sink, window)
    assert not banded.fits(Visibility(sink, window), edge, edge)
    assert banded.fits(Visibility(sink, window), edge + more, edge + more)
    mask = banded._mask(sink, window, torch.device("cpu"), torch.float32)
    block, keys = mask.shape
    assert keys % banded.ALIGN == 0
    assert edge % block == 0
    assert edge + block - (keys - sink) >= sink
    seen = (mask == 0).sum(1)
    assert seen.tolist() == [sink + window] * block


@pytest.mark.parametrize(
    ("rows", "kv_heads", "group", "tokens", "dim", "sink", "window"),
    [(1, 2, 1, 700, 8, 0, 1), (2, 1, 3, 777, 16, 4, 100), (1, 3, 3, 1000, 8, 128, 256), (2, 2, 1, 513, 8, 130, 129)],
)
def test_output_and_gradients_are_the_definitions(
    rows: int, kv_heads: int, group: int, tokens: int, dim: int, sink: int, window: int
) -> None:
    arguments = tensors(rows, kv_heads, group, tokens, dim, torch.float64, "cpu")
    see = Visibility(sink, window)
    assert banded.fits(see, tokens, tokens)
    with use_backend("reference"):
        right = results(*arguments, see)
    got = results(*arguments, see)
    assert dispatch.last_used()["attend_blocks"] == "torch"
    for ours, theirs in zip(got, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("see", [Visibility(4), Visibility(4, 700), Visibility(4, 20, torch.arange(700)[None])])
def test_what_has_no_bands(see: Visibility) -> None:
    assert not banded.fits(see, 700, 700)
    assert not banded.fits(Visibility(4, 20), 700, 701)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("sink", "window"), [(4, 100), (128, 256), (200, 300), (64, 1024)])
def test_definition(dtype: torch.dtype, sink: int, window: int) -> None:
    """Errors are at most twice those of the definition in its dtype, and 4 ulp: products are rounded once more."""
    arguments = tensors(2, 2, 3, 2500, 64, dtype, "cuda")
    see = Visibility(sink, window)
    with use_backend("reference"):
        exact = results(*(x.double() for x in arguments), see)
        same = results(*arguments, see)
    got = results(*arguments, see)
    assert dispatch.last_used()["attend_blocks"] == "torch"
    for ours, theirs, right in zip(got, same, exact, strict=True):
        ulp = torch.finfo(dtype).eps * float(right.abs().max())
        yardstick = float((theirs.double() - right).abs().max())
        assert float((ours.double() - right).abs().max()) <= 2 * yardstick + 4 * ulp


@pytest.mark.cuda
def test_memory_grows_with_the_text_and_nothing_is_compiled_for_a_length() -> None:
    from torch._dynamo.utils import counters

    before, most = dict(counters["stats"]), {}
    for tokens in (3001, 5555, 1 << 13, 1 << 15):
        q, k, v = (torch.randn(1, n, tokens, 64, dtype=torch.bfloat16, device="cuda") for n in (4, 2, 2))
        q.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        ops.attend_blocks(q, k, v, Logits(0.125), Visibility(64, 1024), None).sum().backward()
        most[tokens] = torch.cuda.max_memory_allocated() - held
    assert most[1 << 15] < 5 * most[1 << 13]
    assert dict(counters["stats"]) == before
