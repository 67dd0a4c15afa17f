"""Newest tokens as they are beside others of four bits: exact within them, and the same however the text is cut."""

from __future__ import annotations

import pytest
import torch

import hf_longctx as lc
from hf_longctx.testing import tiny_llama

from .cases import BY_NAME
from .tiny import Case

IDS = torch.randint(8, 64, (2, 60), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "phi3", "falcon_new"])
@torch.no_grad()
def test_as_many_as_there_are_is_the_model_itself(name: str) -> None:
    case: Case = BY_NAME[name]
    model = case.make()
    expected = model(IDS).logits
    with lc.patched(model, "dense", kv=lc.Int4KV(recent=60)):
        torch.testing.assert_close(model(IDS).logits, expected, atol=2e-5, rtol=2e-5)
    with lc.patched(model, "dense", kv=lc.Int4KV(recent=59)):
        assert not torch.allclose(model(IDS).logits[:, -1], expected[:, -1], atol=1e-4)


@torch.no_grad()
def pieces(
    model: torch.nn.Module, ids: torch.Tensor, cuts: list[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of a text in several calls."""
    cache, out = None, []
    for first, last in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        seen = None if mask is None else mask[:, :last]
        call = model(ids[:, first:last], attention_mask=seen, past_key_values=cache, use_cache=True)
        cache = call.past_key_values
        out.append(call.logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("recent", [3, 8, 30])
@pytest.mark.parametrize("cuts", [[59], [1, 2, 3], [20, 21, 22, 40], [8, 16, 24, 25]])
@torch.no_grad()
def test_any_cut_gives_the_same(recent: int, cuts: list[int]) -> None:
    model = lc.patch(tiny_llama(), "dense", kv=lc.Int4KV(recent=recent))
    torch.testing.assert_close(pieces(model, IDS, cuts), model(IDS).logits, atol=1e-4, rtol=1e-4)
    mask = torch.ones_like(IDS)
    mask[0, :13] = 0
    padded = pieces(model, IDS, cuts, mask)
    torch.testing.assert_close(padded[0, 13:], model(IDS[:1, 13:]).logits[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(padded[1], model(IDS[1:]).logits[0], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_tokens_come_back_and_go() -> None:
    model = lc.patch(tiny_llama(), "dense", kv=lc.Int4KV(recent=8))
    expected = model(IDS).logits
    cache = model(IDS[:, :40], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="activate_past_recording"):
        cache.crop(-5)
    cache = model(IDS[:, :1], use_cache=True).past_key_values
    cache.activate_past_recording()
    model(IDS[:, 1:20], past_key_values=cache)
    model(torch.cat((IDS[:, 20:40], IDS[:, :5]), 1), past_key_values=cache)
    cache.crop(-5)
    cache.reorder_cache(torch.tensor([1, 0]))
    after = model(IDS.flip(0)[:, 40:], past_key_values=cache).logits
    torch.testing.assert_close(after, expected.flip(0)[:, 40:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_bytes_and_words() -> None:
    model = lc.patch(tiny_llama(), "dense", kv=lc.Int4KV(recent=8), cuda_graph=False)
    assert lc.Int4KV(recent=8).describe() == "KV int4, the last 8 tokens as they are"
    sizes = []
    for kv in ("int4", lc.Int4KV(recent=8)):
        lc.patch(model, "dense", kv=kv)
        cache = model(IDS, use_cache=True).past_key_values
        sizes.append(lc.report(model).kv_bytes)
        assert cache is not None
    assert sizes[1] - sizes[0] == 2 * 2 * 2 * 2 * 8 * 8 * 4  # layers, rows, heads, k and v, tokens, channels, bytes


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (lc.Quest(16, page=4, dense_layers=0), "read them all, where recent ones are held as they are"),
        (lc.StreamingLLM(4, 16), "keep all tokens"),
    ],
)
def test_heads_that_leave_out_tokens_are_refused(method: object, said: str) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=said):
        lc.patch(model, method, kv=lc.Int4KV(recent=8))
    with pytest.raises(ValueError, match="expected recent as a whole number >= 0; got -1"):
        lc.Int4KV(recent=-1)


@torch.no_grad()
def test_a_layer_with_a_window_of_its_own_has_four_bits_alone() -> None:
    case: Case = BY_NAME["gemma2"]
    model = lc.patch(case.make(), "dense", kv=lc.Int4KV(recent=8))
    torch.testing.assert_close(pieces(model, IDS, [30, 31, 40]), model(IDS).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.cuda
@torch.no_grad()
def test_recorded_steps_on_a_gpu() -> None:
    sizes = {"hidden_size": 256, "head_dim": 64}
    ids = IDS.cuda()
    outs = []
    for on in (True, False):
        model = lc.patch(tiny_llama(**sizes).cuda().bfloat16(), "dense", kv=lc.Int4KV(recent=16), cuda_graph=on)
        got = model.generate(ids, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True)
        outs.append(torch.stack(got.logits, 1))
        report = lc.report(model)
        assert (report.graphs > 0) is on, report.eager
    assert torch.equal(*outs)
    plain = tiny_llama(**sizes).cuda()
    told = lc.patch(plain, "dense", kv=lc.Int4KV(recent=16))(torch.cat((ids, got.sequences[:, 60:-1]), 1)).logits[
        :, 59:
    ]
    assert (outs[0].float() - told).abs().mean() < 0.1 * told.abs().mean()
