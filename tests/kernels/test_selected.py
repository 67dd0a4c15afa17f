"""Attention over selected blocks: by definition, with every kind of selection, position and logit; mass; gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_longctx.kernels import ops
from hf_longctx.kernels.dispatch import use_backend
from hf_longctx.kernels.ops import Logits, Packed, Selection, Turns, Visibility
from hf_longctx.kernels.reference import selected

from .selections import Scene, scenes
from .test_blocks_memory import Largest

MANY = settings(max_examples=60)


@pytest.mark.parametrize("op", [ops.attend_blocks, ops.attend_pages])
@MANY
@given(scene=scenes())
def test_definition(op: Any, scene: Scene) -> None:
    torch.testing.assert_close(op(*scene.arguments), scene.result()[0], atol=scene.allowed, rtol=0)


@MANY
@given(scenes(one=True))
def test_definition_of_decoding(scene: Scene) -> None:
    got = ops.attend_pages(*scene.arguments)
    torch.testing.assert_close(got, scene.result()[0], atol=scene.allowed, rtol=0)


@MANY
@given(scenes(shares=("all", "kv_head")), st.integers(1, 12))
def test_mass(scene: Scene, near: int) -> None:
    out, mass = ops.attend_mass(*scene.arguments, near)
    expected, expected_mass = scene.result(near)
    assert mass.dtype == torch.promote_types(scene.arguments[0].dtype, torch.float32)
    torch.testing.assert_close(out, expected, atol=scene.allowed, rtol=0)
    torch.testing.assert_close(mass.double(), expected_mass, atol=1e-5, rtol=0)


@settings(max_examples=30)
@given(scenes(shares=("all", "kv_head")), st.sampled_from([1, 500]))
def test_parts_are_the_whole(scene: Scene, budget: int) -> None:
    whole = ops.attend_mass(*scene.arguments, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selected, "LOGITS_PER_BLOCK", budget)
        parts = ops.attend_mass(*scene.arguments, 5)
    for mine, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(mine, other, atol=max(scene.allowed, 1e-6 if mine is parts[1] else 0.0), rtol=0)


@pytest.mark.parametrize("tokens", [43, 75, 80])
def test_one_large_block_of_queries_is_read_in_parts(tokens: int) -> None:
    """More queries in a block than fit at a time, and a short block after it."""
    made = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, tokens, 4, generator=made, dtype=torch.float64) for h in (4, 2))
    q_pos = torch.arange(tokens)[None]
    turns = Turns(q_pos, 20, 2, torch.rand(2, generator=made), clamp=15)
    everything = Selection(torch.arange(10, dtype=torch.int32).expand(2, 2, 2, 10), 8, 40)
    arguments = (q, k, k, Logits(0.5), Visibility(), turns)
    expected, mass = ops.attend_mass(*arguments, everything, 9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selected, "LOGITS_PER_BLOCK", 1)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                out, parts = ops.attend_mass(*arguments, everything, 9)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(parts, mass)
    torch.testing.assert_close(ops.attend_blocks(*arguments), expected)


@settings(max_examples=40)
@given(scenes(), st.sampled_from([1, 8]))
def test_everything_selected_is_dense(scene: Scene, q_block: int) -> None:
    rows, _, tokens, _ = scene.q.shape
    stored, block = scene.k.shape[2], scene.selection.block
    q_pos = torch.arange(stored - tokens, stored)[None].clamp(min=-1)
    blocks = torch.arange(-(-stored // block), dtype=torch.int32)
    everything = Selection(blocks.expand(rows, scene.selection.ids.shape[1], -(-tokens // q_block), -1), block, q_block)
    turns = scene.turns and replace(scene.turns, sink_pos=q_pos, lap=scene.turns.lap + 30)
    see = Visibility(q_pos=q_pos, k_pos=torch.arange(stored)[None])
    dense = ops.attend_pages(*scene.arguments[:4], see, turns)
    got = ops.attend_blocks(*scene.arguments[:4], see, turns, everything)
    torch.testing.assert_close(got, dense, atol=2 * scene.allowed, rtol=0)


@settings(max_examples=30)
@given(scenes(), st.sampled_from([4, 8]))
def test_packed_keys_and_values_are_those_that_were_stored(scene: Scene, bits: int) -> None:
    k, v = ops.encode_kv(scene.k, bits), ops.encode_kv(torch.cat((scene.v, scene.v[..., :1]), -1), bits)
    stored = replace(scene, k=ops.decode_kv(k), v=ops.decode_kv(v))
    expected = ops.attend_blocks(*stored.arguments)
    got = ops.attend_blocks(scene.q, k, v, *scene.arguments[3:])
    assert torch.equal(got, expected)


@settings(max_examples=25)
@given(scenes())
def test_gradients(scene: Scene) -> None:
    leaves = [x.requires_grad_() for x in (scene.q, scene.k, scene.v)]
    if scene.logits.sink_logits is not None:
        leaves.append(scene.logits.sink_logits.clone().requires_grad_())

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        return ops.attend_blocks(q, k, v, replace(scene.logits, sink_logits=sinks), *scene.arguments[4:])

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_of_the_dtype(dtype: torch.dtype) -> None:
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 64, 16, generator=made).to(dtype) for h in (8, 2, 2))
    ids = torch.tensor([0, 2, 5, -1], dtype=torch.int32).expand(2, 2, 4, 4)
    turns = Turns(torch.arange(64)[None], 20, 0, torch.rand(8, generator=made), clamp=12)
    rest = (Logits(0.25), Visibility(), turns, Selection(ids, 8, 16))
    got, exact = ops.attend_blocks(q, k, v, *rest), ops.attend_blocks(q.double(), k.double(), v.double(), *rest)
    assert got.dtype == dtype
    ulp = torch.finfo(dtype).eps / 2 * exact.abs() + 200 * torch.finfo(torch.float32).eps
    assert ((got.double() - exact).abs() <= ulp).all()


def test_nothing_selected_gives_zeros() -> None:
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 20, 8)
    none = Selection(torch.full((2, 1, 3, 2), -1, dtype=torch.int32), 4, 2)
    out, mass = ops.attend_mass(q, k, k, Logits(1.0), Visibility(), None, none, 4)
    assert not out.any()
    assert not mass.any()
    assert out.shape == q.shape
    assert mass.shape == (2, 2, 3, 8)


def test_what_is_not_selected_is_not_read() -> None:
    q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 20, 8)
    ids = torch.tensor([1, 4, -1], dtype=torch.int32).expand(1, 1, 3, 3)
    poisoned = torch.full_like(k, torch.nan)
    for j in (1, 4):
        poisoned[:, :, 4 * j : 4 * j + 4] = k[:, :, 4 * j : 4 * j + 4]
    rest = (Logits(1.0), Visibility(), None, Selection(ids, 4, 2))
    assert torch.equal(ops.attend_blocks(q, poisoned, poisoned, *rest), ops.attend_blocks(q, k, k, *rest))


def test_the_torch_backend_says_that_it_cannot() -> None:
    x = torch.randn(1, 2, 3, 4)
    selection = Selection(torch.zeros(1, 1, 3, 1, dtype=torch.int32), 4, 1)
    with use_backend("torch"), pytest.raises(NotImplementedError, match="torch: cannot read selected blocks"):
        ops.attend_pages(x, x, x, Logits(1.0), Visibility(), None, selection)


@pytest.mark.parametrize("packed", [False, True])
def test_memory_is_that_of_the_selected_blocks(packed: bool) -> None:
    def run(tokens: int) -> int:
        q, k = torch.randn(1, 2, tokens, 4), torch.randn(1, 1, tokens, 4)
        store: Tensor | Packed = ops.encode_kv(k, 8) if packed else k
        ids = torch.tensor([0, 3, 7], dtype=torch.int32).expand(1, 1, tokens // 32, 3)
        with torch.no_grad(), Largest() as seen:
            ops.attend_blocks(q, store, store, Logits(0.5), Visibility(), None, Selection(ids, 16, 32))
        return seen.elements

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selected, "LOGITS_PER_BLOCK", 1 << 12)
        small, large = run(4096), run(8192)
    assert small == 4096 * 2 * 4  # the output: no logits and no copy of the keys are larger
    assert large == 2 * small
