"""Where heads are seen to look is where transformers' own attention weights are largest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_longctx as lc
from hf_longctx import Absolute, HeadGroup, HeadPolicy, KeepAll
from hf_longctx.cache.step import Step
from hf_longctx.context import Read
from hf_longctx.heads import tap as room
from hf_longctx.heads.tap import Gaze, strongest, tapped
from hf_longctx.kernels import ops
from hf_longctx.testing import tiny_llama

from ..integration.again import recorders
from ..integration.cases import BY_NAME
from ..integration.snapshot import differences, snapshot


def gaze(model: Any, ids: Tensor, mask: Tensor | None, queries: int, top: int = 4) -> dict[Any, list[Tensor]]:
    seen = Gaze(queries, top)
    with lc.patched(model, "dense"), tapped(model, seen), torch.no_grad():
        model(ids, attention_mask=mask, use_cache=True)
    return seen.last(1)


def eager(model: Any, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return list(model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mpt", "qwen2_sliding", "qwen3", "llama_yarn"])
@pytest.mark.parametrize("chunk", [7, 1 << 14])
def test_places_and_shares_are_those_of_the_models_own_weights(
    name: str, chunk: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room.strongest, "__defaults__", (chunk,))
    case = BY_NAME[name]
    model, ids = case.make().to(device), case.prompt(40, rows=2).to(device)
    found = gaze(model, ids, None, 5)
    compared = 0
    for layer, weights in enumerate(eager(model, ids, None)):
        best = weights[:, :, -5:].double().topk(4, dim=-1)
        clear = best.values[..., 0] - best.values[..., 1] > 1e-4
        compared += int(clear.sum())
        for head in range(weights.shape[1]):
            places, shares = found[layer, head]
            assert places[clear[:, head].cpu()].tolist() == best.indices[:, head, :, 0][clear[:, head]].tolist()
            expected = best.values[:, head].sum(-1).float().cpu()
            torch.testing.assert_close(shares, expected, rtol=1e-3, atol=1e-4)
    assert compared > 40


def test_padded_rows_look_where_they_look_alone(device: torch.device) -> None:
    model = tiny_llama().to(device)
    ids = torch.randint(64, (2, 30), generator=torch.Generator().manual_seed(0)).to(device)
    mask = torch.ones_like(ids)
    mask[0, :12] = 0
    both = gaze(model, ids, mask, 3)
    short, long = gaze(model, ids[:1, 12:], None, 3), gaze(model, ids[1:], None, 3)
    for head, (places, shares) in both.items():
        assert places.tolist() == [short[head][0][0].tolist(), long[head][0][0].tolist()]
        torch.testing.assert_close(shares, torch.cat((short[head][1], long[head][1])), rtol=1e-4, atol=1e-5)


def test_a_model_that_is_looked_at_computes_what_it_did_and_is_as_it_was() -> None:
    model = tiny_llama()
    ids = torch.randint(64, (1, 20), generator=torch.Generator().manual_seed(0))
    before = snapshot(model)
    plain = model(ids).logits
    lc.patch(model, "dense")
    dense = model(ids).logits
    with tapped(model, Gaze()):
        assert torch.equal(model(ids).logits, dense)
        assert lc.patch(model, "dense")(ids).logits.equal(dense)
    lc.unpatch(model)
    assert torch.equal(model(ids).logits, plain)
    assert differences(before, snapshot(model)) == []


def test_taps_nest_the_inner_sees_what_the_outer_said() -> None:
    model = lc.patch(tiny_llama(), "dense")
    ids = torch.randint(64, (1, 9), generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []

    def note(read: Read) -> Tensor:
        seen.append(read.out)
        return read.out

    with tapped(model, lambda read: torch.zeros_like(read.out)), tapped(model, note):
        model(ids)
    assert len(seen) == 2
    assert not any(bool(out.any()) for out in seen)
    seen.clear()
    with tapped(model, note):
        model(ids)
    assert all(bool(out.any()) for out in seen)


def test_heads_of_a_group_have_their_numbers_in_the_layer() -> None:
    model = tiny_llama()
    pattern = [[0.9, 0.1], [0.1, 0.9]]
    ids = torch.randint(64, (1, 30), generator=torch.Generator().manual_seed(0))
    duo, dense = Gaze(), Gaze()
    lc.patch(model, lc.DuoAttention(pattern=pattern, sparsity=0.5, sinks=0, window=4))
    with tapped(model, duo), torch.no_grad():
        model(ids)
    with lc.patched(model, "dense"), tapped(model, dense), torch.no_grad():
        model(ids)
    whole, windowed = dense.last(1), duo.last(1)
    assert windowed[0, 0][0].equal(whole[0, 0][0])
    assert windowed[0, 1][0].equal(whole[0, 1][0])
    assert all(int(windowed[0, head][0]) >= 26 for head in (2, 3))
    assert all(int(windowed[1, head][0]) >= 26 for head in (0, 1))


def test_a_plan_that_leaves_keys_out_is_refused_and_nothing_runs() -> None:
    model = lc.patch(tiny_llama(), "inf_llm", local=16)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with tapped(model, Gaze()), pytest.raises(lc.UnsupportedError, match="Patch with 'dense'"):
        model(ids)
    model(ids)


def test_a_tap_sees_every_step_though_steps_are_recorded() -> None:
    model = lc.patch(tiny_llama(), "dense")
    ids = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(0))
    heard: list[int] = []

    def note(read: Read) -> Tensor:
        heard.append(read.layer)
        return read.out

    knobs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with recorders() as again:
        with tapped(model, note):
            model.generate(ids, **knobs)
        assert again.replayed == 0
        assert heard == [0, 1] * 8
        model.generate(ids, **knobs)
        assert again.replayed > 0
    assert len(heard) == 16


def test_an_unpatched_model_is_refused() -> None:
    with pytest.raises(ValueError, match="tapped: expected a patched model"), tapped(tiny_llama(), Gaze()):
        pass


class _Largest(TorchDispatchMode):
    """The most elements that any fresh tensor has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        fresh = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in known]
        self.elements = max([self.elements, *(x.untyped_storage().nbytes() // x.element_size() for x in fresh)])
        return out


@pytest.mark.parametrize("stored", [1024, 8192])
def test_what_is_held_does_not_grow_with_the_text(stored: int) -> None:
    made = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 3, 8, generator=made), torch.randn(1, 2, stored, 8, generator=made)
    step = Step.of(stored - 3, 3, q.device, None, None)
    group = HeadGroup((0, 1), HeadPolicy(KeepAll(), Absolute()))
    read = Read(0, group, step, q, k, k, ops.Logits(0.5), ops.Visibility(), q)
    with _Largest() as largest:
        places, _ = strongest(read, 3, 4, 64)
    assert largest.elements <= max(stored, 2 * 4 * 3 * 68)  # the numbers of the places, and two chunks
    keys = k.repeat_interleave(2, 1)
    logits = (q @ keys.mT).masked_fill(torch.arange(stored) > torch.arange(stored - 3, stored)[:, None], -torch.inf)
    assert places.equal(logits.argmax(-1))
