"""What attention is defined to be: the reference against a loop in Python floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_longctx.kernels import ops
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.reference import attend

from .scenes import Scene, scenes, shuffled

MANY = settings(max_examples=150)


def assert_defined(op: Callable[..., torch.Tensor], scene: Scene) -> None:
    """Equal in float64, up to half an ulp for every term of the sums; angles are below 100."""
    with use_backend("reference"):
        got = op(*scene.arguments(torch.float64))
    terms = scene.k.shape[2] + scene.q.shape[3] + 100
    allowed = terms * torch.finfo(torch.float64).eps * max(1.0, float(scene.v.abs().max() if scene.v.numel() else 0))
    torch.testing.assert_close(got, scene.result(), atol=allowed, rtol=0)


@MANY
@given(scenes())
def test_attend_blocks(scene: Scene) -> None:
    assert_defined(ops.attend_blocks, scene)


@MANY
@given(scenes())
def test_attend_blocks_in_many_blocks(scene: Scene) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend, "LOGITS_PER_BLOCK", 1)
        assert_defined(ops.attend_blocks, scene)


@MANY
@given(scenes(one=True), st.integers(0, 9))
def test_attend_pages_in_any_order(scene: Scene, seed: int) -> None:
    assert_defined(ops.attend_pages, shuffled(scene, seed))


@settings(max_examples=100)
@given(scenes(most=8), st.integers(0, 9))
def test_attend_pages_of_some_queries(scene: Scene, seed: int) -> None:
    assert_defined(ops.attend_pages, shuffled(scene, seed))


@pytest.mark.parametrize("op", [ops.attend_blocks, ops.attend_pages])
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nothing_visible_gives_zeros(op: Any, backend: str, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, heads, 3, 8).to(dtype) for heads in (4, 2, 2))
    see = ops.Visibility(0, 5, torch.tensor([[-1, 0, 1], [-1, -1, -1]]), torch.tensor([[-1, 0, 1], [-1, -1, -1]]))
    with use_backend(backend):
        out = op(q, k, v, ops.Logits(1.0), see, None)
    assert out.isfinite().all()
    assert not out[0, :, 0].any()
    assert not out[1].any()
    assert out[0, :, 1:].abs().min() > 0


def test_learned_sinks_alone_give_zeros() -> None:
    q, k, v = (torch.randn(1, 2, 3, 8) for _ in range(3))
    see = ops.Visibility(0, 5, torch.tensor([[0, 1, 2]]), torch.full((1, 3), -1))
    out = ops.attend_blocks(q, k, v, ops.Logits(1.0, sink_logits=torch.zeros(2)), see, None)
    assert not out.any()


def test_take_tokens() -> None:
    x = torch.randn(2, 3, 5, 4)
    index = torch.tensor([[4, 0, 0], [1, 3, 2]])
    out = ops.take_tokens(x, index)
    assert all(torch.equal(out[b, h, t], x[b, h, index[b, t]]) for b in range(2) for h in range(3) for t in range(3))


def test_logits_of_some_heads() -> None:
    logits = ops.Logits(0.5, 2.0, torch.arange(4.0), -torch.arange(4.0))
    some = logits.heads(torch.tensor([2, 0]))
    assert (some.scale, some.softcap) == (0.5, 2.0)
    assert some.sink_logits.tolist() == [2, 0]
    assert some.slopes.tolist() == [-2, 0]
    assert not some.plain
    assert not ops.Logits(1.0, slopes=torch.ones(1)).plain
    assert ops.Logits(1.0).plain
