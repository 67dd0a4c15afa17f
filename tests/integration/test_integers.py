"""QoQ layers after norms and gates: the very logits without short cuts, and who has one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

import hf_longctx as lc
from hf_longctx import integers, shortcut
from hf_longctx.quantize.run import round_all
from hf_longctx.testing.models import tiny_llama
from hf_longctx.weights.qoq.config import QoQConfig

from ..kernels.built import need
from .snapshot import differences, snapshot

IDS = torch.arange(3, 23).view(2, 10)
NEW, LAYERS = 5, 2


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Short cuts on the CPU, and how often each is taken."""
    need("cpu")
    monkeypatch.setattr(shortcut, "DEVICES", {"cpu"})
    found: Counter[str] = Counter()

    def counting(name: str, run: Any) -> Any:
        def call(*args: Any) -> Any:
            found[name] += 1
            return run(*args)

        return call

    for name in ("quantize_norm", "quantize_gated"):
        monkeypatch.setattr(integers, name, counting(name, getattr(integers, name)))
    return found


def model(dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    made: Any = tiny_llama(hidden_size=64, intermediate_size=96, head_dim=16, **settings)
    round_all(made, QoQConfig(4, 32))
    return made.to(dtype).eval()


def logits(of: Any) -> torch.Tensor:
    out = of.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_prompt_and_steps(calls: Counter[str], dtype: torch.dtype) -> None:
    quantized = lc.patch(model(dtype), "dense")
    got = logits(quantized)
    assert calls == {"quantize_norm": (2 * LAYERS + 1) * NEW, "quantize_gated": LAYERS * NEW}
    assert lc.report(quantized).norms == 2 * LAYERS + 1
    with pytest.MonkeyPatch.context() as context:
        context.setattr(shortcut, "DEVICES", set())
        assert torch.equal(got, logits(lc.patch(model(dtype), "dense")))
    assert sum(calls.values()) == (3 * LAYERS + 1) * NEW


def test_what_is_left_alone(calls: Counter[str]) -> None:
    """Other dtypes, other activations, models without QoQ layers, layers that somebody watches."""
    logits(lc.patch(model(torch.float32), "dense"))
    assert not calls
    logits(lc.patch(model(hidden_act="gelu"), "dense"))
    assert calls["quantize_gated"] == 0
    calls.clear()
    logits(lc.patch(tiny_llama(hidden_size=64, intermediate_size=96, head_dim=16).bfloat16(), "dense"))
    assert not calls
    watched, seen = lc.patch(model(), "dense"), []
    watched.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append(1))
    logits(watched)
    assert (len(seen), calls["quantize_gated"]) == (NEW, (LAYERS - 1) * NEW)


class Swapped(LlamaMLP):
    """The gate is what is called `up_proj`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Doubled(LlamaMLP):
    """Something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(("kind", "gated"), [(Swapped, LAYERS), (Doubled, LAYERS - 1)])
def test_who_is_who_is_seen(calls: Counter[str], kind: type[nn.Module], gated: int) -> None:
    quantized = model()
    quantized.model.layers[0].mlp.__class__ = kind
    with pytest.MonkeyPatch.context() as context:
        context.setattr(shortcut, "DEVICES", set())
        expected = logits(lc.patch(quantized, "dense"))
    got = logits(lc.patch(quantized, "dense"))
    assert calls["quantize_gated"] == gated * NEW
    assert torch.equal(got, expected)


@pytest.mark.usefixtures("calls")
def test_unpatch_leaves_nothing() -> None:
    quantized = model()
    logits(quantized)
    before = snapshot(quantized)
    logits(lc.patch(lc.patch(quantized, "dense"), "dense"))
    assert differences(before, snapshot(lc.unpatch(quantized))) == []
