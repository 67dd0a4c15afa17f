"""What is seen of a model is what it does: block masses of its own attention, and its output unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hf_longctx as lc
from hf_longctx.kernels import ops
from hf_longctx.testing import tiny_llama
from hf_longctx.tune import collect as room

from ..integration.cases import BY_NAME
from ..integration.snapshot import differences, snapshot

BLOCK, STRIDE, TOKENS = 8, 4, 40


def look(model: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any], Any, room.Findings]:
    """Masses and scores of each layer `[Hq, N, N]`, the decoder's output, and the findings of one text."""
    masses, scores, outputs = [], [], []

    def spy(mass: Any, score: Any) -> Any:
        masses.append(mass)
        scores.append(score)
        return stock(mass, score)

    stock = room.curves
    monkeypatch.setattr(room, "curves", spy)
    hook = model.get_decoder().register_forward_hook(lambda module, args, out: outputs.append(out.last_hidden_state))
    findings = room.collect(model, [ids], STRIDE, BLOCK, 0.9)
    hook.remove()
    monkeypatch.undo()
    return masses, scores, outputs[0], findings


def test_masses_are_those_of_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    ids = torch.randint(64, (TOKENS,), generator=torch.Generator().manual_seed(0))
    masses, scores, out, findings = look(model, ids, monkeypatch)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model.model(ids[None], output_attentions=True, use_cache=False)
    torch.testing.assert_close(out, eager.last_hidden_state, rtol=1e-4, atol=1e-4)
    n = TOKENS // BLOCK
    for layer in range(2):
        weights = eager.attentions[layer][0].double()
        expected = weights.view(4, n, BLOCK, n, BLOCK).sum((2, 4)) / BLOCK
        np.testing.assert_allclose(masses[layer], expected, atol=1e-5)
        np.testing.assert_allclose(scores[layer].sum(2), BLOCK // STRIDE, atol=1e-5)
        assert [curve.blocks for curve in findings.curves[layer]] == [n * (n + 1) // 2] * 4
        assert len(findings.at_coverage[layer]) == 4


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma2", "gemma3", "gpt_oss", "qwen2_sliding", "llama_yarn", "granite", "qwen2_5_vl"]
)
def test_the_model_computes_what_it_did(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is looked at, too: softcap, learned sinks, windows and scales are the model's own."""
    case = BY_NAME[name]
    model, ids = case.make(), case.prompt(TOKENS)
    with torch.no_grad():
        expected = case.make().get_decoder()(ids, use_cache=False).last_hidden_state
    before = snapshot(model)
    _, _, out, findings = look(model, ids[0], monkeypatch)
    assert (out - expected).abs().max() < 1e-4 * expected.abs().max()
    assert differences(before, snapshot(model)) == []
    assert sorted(findings.curves) == [i for i in range(case.layers) if i not in case.sliding]


def test_several_texts_are_one_curve_and_the_largest_share() -> None:
    model = BY_NAME["llama"].make()
    ids = BY_NAME["llama"].prompt(TOKENS, rows=2)
    one, two, both = (room.collect(model, texts, STRIDE, BLOCK, 0.9) for texts in ([ids[0]], [ids[1]], list(ids)))
    for layer in range(2):
        shares = np.maximum(one.at_coverage[layer], two.at_coverage[layer])
        np.testing.assert_allclose(both.at_coverage[layer], shares, atol=1e-6)
        for a, b, whole in zip(one.curves[layer], two.curves[layer], both.curves[layer], strict=True):
            assert whole.read(0.7) == a.read(0.7) + b.read(0.7)


class _Largest(TorchDispatchMode):
    """The most elements that any tensor has."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def test_no_tensor_is_larger_than_a_block_of_queries_of_one_kv_head() -> None:
    q, k, v = torch.randn(8, 1024, 8), torch.randn(2, 1024, 8), torch.randn(2, 1024, 8)
    with _Largest() as largest:
        out, _ = room.attend(q, k, v, 16, ops.Logits(0.5), None)
    assert largest.elements <= max(4 * 16 * 1024, q.numel())
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [16, 39])
def test_texts_come_in_whole_blocks(tokens: int) -> None:
    model = BY_NAME["llama"].make()
    before = snapshot(model)
    with pytest.raises(ValueError, match="expected texts in whole blocks of 8 tokens, at least three"):
        room.collect(model, [torch.zeros(tokens, dtype=torch.int64)], STRIDE, BLOCK, 0.9)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize("name", ["falcon_new", "mpt"])
def test_families_that_cannot_be_looked_at_are_refused(name: str) -> None:
    with pytest.raises(lc.UnsupportedError, match="tune: expected a model whose attention goes through"):
        room.collect(BY_NAME[name].make(), [torch.zeros(TOKENS, dtype=torch.int64)], STRIDE, BLOCK, 0.9)


def test_a_patched_model_is_refused() -> None:
    model = lc.patch(BY_NAME["llama"].make(), "dense")
    with pytest.raises(RuntimeError, match=r"Call hf_longctx\.unpatch\(model\)"):
        room.collect(model, [torch.zeros(TOKENS, dtype=torch.int64)], STRIDE, BLOCK, 0.9)
    model(torch.zeros(1, 4, dtype=torch.int64))
