"""`StreamingVLM` without a session lets nothing go: rotating keys at read is then the stock model, call by call."""

from __future__ import annotations

import pytest
import torch

import hf_longctx as lc

from ..integration.cases import BY_NAME as TEXT
from .vlms import BY_NAME, Watched, clip, families


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("calls", [[40], [1] * 40, [11, 1, 1, 20, 7]], ids=["prompt", "steps", "chunks"])
def test_any_chunking_of_a_padded_batch_is_the_stock_model(name: str, calls: list[int]) -> None:
    case = TEXT[name]
    model, ids = case.make(), case.prompt(40, rows=2)
    mask = (torch.arange(40) >= torch.tensor([0, 9])[:, None]).long()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with lc.patched(model, lc.StreamingVLM()):
            cache, got, at = None, [], 0
            for size in calls:
                out = model(ids[:, at : at + size], attention_mask=mask[:, : at + size], past_key_values=cache)
                cache, at = out.past_key_values, at + size
                got.append(out.logits)
            alone = model(ids[:1], use_cache=False).logits
        again = model(ids, attention_mask=mask).logits
    error = ((torch.cat(got, 1) - expected) * mask[..., None]).abs().max() / expected.abs().max()
    assert float(error) < 1e-5
    assert float((alone - expected[:1]).abs().max() / expected.abs().max()) < 1e-5
    assert torch.equal(again, expected)


@pytest.mark.parametrize("name", families("qwen2_5_vl", "qwen3_vl", "idefics3"))
def test_generate_of_a_prompt_with_pictures_is_the_stock_models(name: str) -> None:
    model, processor = BY_NAME[name].make()
    with lc.stream.Session(model, processor, max_new_tokens=3) as session:
        watched = Watched(session)
        list(session.run(clip(3)))
        inputs = watched.inputs()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with lc.patched(model, lc.StreamingVLM()):
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), expected)


def test_a_decoder_that_rotates_layers_apart_is_refused() -> None:
    model = TEXT["gemma3"].make()
    policy = lc.HeadPolicy(lc.ModalityWindow(), lc.Contiguous())
    plan = lc.Plan("x", (lc.LayerPlan((lc.HeadGroup((0, 1), policy),)),) * 4)
    with pytest.raises(lc.UnsupportedError, match=r"expected a decoder with one rotary_emb\(x, position_ids\)"):
        lc.patch(model, plan)
    ids = TEXT["gemma3"].prompt(8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, TEXT["gemma3"].make()(ids).logits)
