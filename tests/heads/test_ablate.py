"""Ablated heads say what they should, in the queries in which they should, and afterwards everything is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_longctx as lc
from hf_longctx.context import Read
from hf_longctx.heads.ablate import MODES, ablated, mean_outputs
from hf_longctx.heads.tap import tapped
from hf_longctx.testing import tiny_llama

from ..integration.cases import BY_NAME
from ..integration.snapshot import differences, snapshot

HEADS = [(0, 1), (1, 0), (1, 3)]


def tokens(rows: int = 1, count: int = 30) -> Tensor:
    return torch.randint(64, (rows, count), generator=torch.Generator().manual_seed(0))


def listen(model: Any, ids: Tensor, mask: Tensor | None = None) -> tuple[dict[int, Read], Tensor]:
    """What each layer read and said, after every ablation in force, and the logits."""
    heard: dict[int, Read] = {}

    def note(read: Read) -> Tensor:
        heard[read.layer] = read
        return read.out

    with tapped(model, note), torch.no_grad():
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    return heard, logits


def silenced(model: Any, ids: Tensor, heads: list[tuple[int, int]], last: bool) -> Tensor:
    """The oracle: an unpatched model, whose output projections see zeros in place of heads."""
    hooks = []
    for number, layer in enumerate(model.model.layers):
        mine = [head for at, head in heads if at == number]

        def cut(module: Any, args: tuple[Tensor], mine: list[int] = mine) -> tuple[Tensor]:
            x = args[0].clone().unflatten(-1, (4, -1))
            x[:, -1:, mine] = 0.0
            if not last:
                x[:, :, mine] = 0.0
            return (x.flatten(-2),)

        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(cut))
    with torch.no_grad():
        out: Tensor = model(ids).logits
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize("last", [False, True])
def test_zero_is_a_model_whose_output_projection_does_not_see_the_heads(last: bool) -> None:
    model, ids = tiny_llama(), tokens(2)
    expected = silenced(model, ids, HEADS, last)
    with lc.patched(model, "dense"), ablated(model, HEADS, "zero", ["decode"] if last else ["prefill", "decode"]):
        got = model(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model(ids).logits[:, -1], expected[:, -1], atol=1e-2)


@pytest.mark.parametrize("mode", ["uniform", "local"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mpt", "qwen2_sliding"])
def test_uniform_and_local_are_their_definition(name: str, mode: str, device: torch.device) -> None:
    case = BY_NAME[name]
    model, ids = case.make().to(device), case.prompt(24).to(device)
    with lc.patched(model, "dense"):
        plain, _ = listen(model, ids)
        with ablated(model, [(0, 1), (0, 2)], mode, window=5):
            heard, _ = listen(model, ids)
    read, out = plain[0], heard[0].out
    for head in range(4):
        kv = head * read.k.shape[1] // read.q.shape[1]
        for t in range(24):
            low = 0 if read.see.window is None else max(0, t - read.see.window + 1)
            if mode == "local":
                low = max(low, t - 4)
            k, v = read.k[0, kv, low : t + 1].double(), read.v[0, kv, low : t + 1].double()
            x = k @ read.q[0, head, t].double() * read.logits.scale
            if read.logits.softcap is not None:
                x = read.logits.softcap * torch.tanh(x / read.logits.softcap)
            if read.logits.slopes is not None:
                x = x + read.logits.slopes[head].double() * torch.arange(low - t, 1, device=device)
            if mode == "uniform":
                x = torch.zeros_like(x)
            elif read.logits.sink_logits is not None:
                x = torch.cat((x, read.logits.sink_logits[head : head + 1].double()))
            expected = x.softmax(0)[: len(v)] @ v if head in (1, 2) else read.out[0, head, t].double()
            torch.testing.assert_close(out[0, head, t].double(), expected, rtol=2e-3, atol=2e-4)


def test_mean_is_the_mean_over_the_text_whatever_is_read() -> None:
    model, ids = tiny_llama(), tokens()
    with lc.patched(model, "dense"):
        plain, _ = listen(model, ids)
        means = mean_outputs(model, ids[0])
        with ablated(model, HEADS[:1], "mean", means=means):
            heard, _ = listen(model, tokens(count=12))
    for head in range(4):
        torch.testing.assert_close(means[0, head], plain[0].out[0, head].mean(0))
    assert heard[0].out[0, 1].equal(means[0, 1].expand(12, -1))


@pytest.mark.parametrize("mode", MODES)
def test_phases_are_the_last_query_of_a_call_and_all_others(mode: str) -> None:
    model, ids = lc.patch(tiny_llama(), "dense"), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    means = mean_outputs(model, ids[1])
    plain, _ = listen(model, ids, mask)
    said = {}
    for phases in (("prefill",), ("decode",), ("prefill", "decode")):
        with ablated(model, [(0, 1)], mode, phases, 3, means):
            heard, _ = listen(model, ids, mask)
        said[phases] = heard[0].out
    whole, both = plain[0].out, said["prefill", "decode"]
    pos = plain[0].step.pos
    for row, last in ((0, 12), (1, 19)):
        real = pos[row] >= 0
        here = torch.arange(20) == last
        assert not said["decode",][row, 1, last].equal(whole[row, 1, last])
        assert said["decode",][row, :, real & ~here].equal(whole[row, :, real & ~here])
        assert said["decode",][row, :, last].equal(both[row, :, last])
        assert said["prefill",][row, :, last].equal(whole[row, :, last])
        assert said["prefill",][row, :, real & ~here].equal(both[row, :, real & ~here])
    assert both[:, [0, 2, 3]].equal(whole[:, [0, 2, 3]])


@pytest.mark.parametrize("mode", MODES)
def test_generate_ablates_step_by_step_as_one_call_does(mode: str, device: torch.device) -> None:
    model, ids = lc.patch(tiny_llama().to(device), "dense"), tokens(2, 20).to(device)
    means = mean_outputs(model, ids[0])
    knobs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with ablated(model, HEADS, mode, window=3, means=means), torch.no_grad():
        written = model.generate(ids, attention_mask=torch.ones_like(ids), **knobs)
        step_by_step = [int(model(written[:1, :n]).logits[0, -1].argmax()) for n in range(20, 26)]
    assert written[0, 20:].tolist() == step_by_step
    assert not written.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **knobs))


def test_no_heads_and_the_end_of_the_block_change_nothing() -> None:
    model, ids = tiny_llama(), tokens()
    before, plain = snapshot(model), model(ids).logits
    lc.patch(model, "dense")
    dense = model(ids).logits
    with ablated(model, []):
        assert model(ids).logits.equal(dense)
    with ablated(model, HEADS):
        assert not model(ids).logits.equal(dense)
    assert model(ids).logits.equal(dense)
    lc.unpatch(model)
    assert model(ids).logits.equal(plain)
    assert differences(before, snapshot(model)) == []


@pytest.mark.parametrize(
    ("heads", "knobs", "said"),
    [
        ([(2, 0)], {}, r"heads: expected a head of the model \(2 layers of 4 query heads\); got 2-0"),
        ([(0, 4)], {}, "got 0-4"),
        ([(0, -1)], {}, "got 0--1"),
        ([(0, 1)], {"mode": "half"}, "expected a mode among zero, mean, uniform, local; got 'half'"),
        ([(0, 1)], {"phases": ["train"]}, "expected phases among prefill, decode"),
        ([(0, 1)], {"phases": []}, "expected phases among prefill, decode"),
        ([(0, 1)], {"mode": "local", "window": 0}, "expected a window of at least 1 token; got 0"),
        ([(0, 1)], {"mode": "mean"}, "expected means of all heads that are ablated"),
    ],
)
def test_what_cannot_be_ablated_is_refused(heads: Any, knobs: dict[str, Any], said: str) -> None:
    model = lc.patch(tiny_llama(), "dense")
    dense = model(tokens()).logits
    with pytest.raises(ValueError, match=said), ablated(model, heads, **knobs):
        pass
    assert model(tokens()).logits.equal(dense)


def test_an_unpatched_model_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a patched model"), ablated(tiny_llama(), HEADS):
        pass
