"""Sessions on a GPU: what they say on the CPU, with CUDA graphs and without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf

import hf_longctx as lc
from hf_longctx.stream import Session
from hf_longctx.testing.pixels import Pixels

from ..integration.tiny import _widen
from .vlms import clip

pytestmark = [pytest.mark.cuda]

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

KNOBS: dict[str, Any] = {"window_s": 4, "text_sink": 120, "text_window": 120, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def vlm() -> tuple[Any, Any]:
    """Heads of 64 channels, as the compiled kernels take them; layers of the tower that attend in windows, and not."""
    processor = Pixels()
    ids = processor.tokenizer.convert_tokens_to_ids
    config = hf.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]},
            "bos_token_id": None,
            "eos_token_id": ids("<|im_end|>"),
            "pad_token_id": 0,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": 256,
            "fullatt_block_indexes": [1, 3],
            "window_size": 56,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = hf.Qwen2_5_VLForConditionalGeneration(config).eval()
    _widen(model, 0)
    return model, processor


def seen(model: Any, processor: Any, graphs: bool) -> tuple[list[torch.Tensor], int, int]:
    """What the text side is given of each round, and how many towers and calls were recorded."""
    found: list[torch.Tensor] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["inputs_embeds"].shape[1] > 8:
            found.append(kwargs["inputs_embeds"].clone())

    with Session(model, processor, **KNOBS) as session:
        lc.patch(model, session.method, cuda_graph=graphs)
        hook = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        for _ in session.run(clip(10, size=(112, 112))):
            pass
        hook.remove()
        return found, len(session.engine.reader.tower.graphs), lc.report(model).graphs


def said(model: Any, processor: Any, streams: int, graphs: bool = True) -> tuple[list[tuple[int, str]], lc.Report]:
    clips = [clip(16, size=(56, 84), seed=seed) for seed in range(streams)]
    with Session(model, processor, **KNOBS, streams=streams) as session:
        lc.patch(model, session.method, cuda_graph=graphs)
        events = list(session.run(clips[0] if streams == 1 else clips))
        return [(event.stream, event.text) for event in events], lc.report(model)


@pytest.mark.parametrize("streams", [1, 2])
def test_it_says_what_it_says_on_a_cpu(vlm: tuple[Any, Any], streams: int) -> None:
    model, processor = vlm
    expected, _ = said(model, processor, streams)
    moved = copy.deepcopy(model).cuda()
    plain, _ = said(moved, processor, streams, graphs=False)
    recorded, report = said(moved, processor, streams)
    assert recorded == plain == expected
    assert report.eager is None
    assert report.graphs > 0


def test_in_bfloat16_graphs_change_nothing_and_bytes_stand_still(vlm: tuple[Any, Any]) -> None:
    model = copy.deepcopy(vlm[0]).to("cuda", torch.bfloat16)
    assert said(model, vlm[1], 1, graphs=False)[0] == said(model, vlm[1], 1)[0]
    held = []
    with Session(model, vlm[1], **KNOBS) as session:
        for _ in session.run(clip(40, size=(56, 84), t=1000)):
            held.append((session.stats.bytes_held, torch.cuda.memory_allocated()))
    assert len({held_bytes for held_bytes, _ in held[25:]}) == 1
    assert max(live for _, live in held[25:]) <= min(live for _, live in held[25:]) + 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_towers_give_what_they_give(vlm: tuple[Any, Any], dtype: torch.dtype) -> None:
    model = copy.deepcopy(vlm[0]).to("cuda", dtype)
    expected, towers, graphs = seen(model, vlm[1], graphs=False)
    assert (towers, graphs) == (0, 0)
    got, towers, graphs = seen(model, vlm[1], graphs=True)
    assert towers == 1
    assert graphs >= (2 if dtype == torch.bfloat16 else 1)  # rounds are recorded in 16 bits
    for ours, theirs in zip(got, expected, strict=True):
        bound = 2e-2 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * float(theirs.abs().max()))
