"""Training inputs: the model's own template and processor over the whole conversation, labels on answers alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_longctx.streaming.frames import Frame
from hf_longctx.testing.vision import tiny_qwen2_5_vl
from hf_longctx.training.adapt import freeze_vision, text_linears
from hf_longctx.training.chunks import Asked, Chunk, Word
from hf_longctx.training.collator import StreamCollator

from ..operators import needs_torchvision
from ..stream.films import film

pytestmark = needs_torchvision

TALK = Chunk("a", 2, 5, "Say.", "", (Word(2.1, 2.4, "Kick"), Word(2.5, 2.6, "off"), Word(4.0, 4.1, "goal")))
ASKED = Chunk("b", 0, 2, "Name it.", "before", (), (Asked(None, 1.5, "Who?", "She."),))


def noise(video: str, start: float, end: float) -> list[Frame]:
    """Two pictures a second, of noise that depends on the video and the time."""
    made = torch.Generator().manual_seed(ord(video) + int(start))
    return [
        Frame(k / 2, torch.randint(0, 256, (60, 90, 3), dtype=torch.uint8, generator=made))
        for k in range(int(2 * (end - start)))
    ]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return tiny_qwen2_5_vl()


def whole(processor: Any, chunk: Chunk, replies: list[tuple[str, str]], before: str = "") -> dict[str, Any]:
    """The conversation through the processor in one call, as its makers mean it."""

    def said(role: str, text: str, *more: dict[str, str]) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}, *more]}

    messages = [said("user", chunk.query)] + ([said("assistant", before)] if before else [])
    for number, (question, reply) in enumerate(replies):
        start = chunk.start + number
        text = f"Time={start:.1f}-{start + 1:.1f}s" + (f" {question}" if question else "")
        messages += [said("user", text, {"type": "video"}), said("assistant", reply)]
    frames = [frame.image.permute(2, 0, 1) for frame in noise(chunk.video, chunk.start, chunk.end)]
    videos = [torch.stack(frames[2 * n : 2 * n + 2]) for n in range(len(replies))]
    meta = [{"total_num_frames": 2, "fps": 2.0, "duration": 1.0, "frames_indices": [0, 1]} for _ in videos]
    text = processor.apply_chat_template(messages, tokenize=False)
    return dict(processor(text=[text], videos=videos, video_metadata=meta, do_sample_frames=False, return_tensors="pt"))


SPOKEN = [("", "Kick off ..."), ("", " ..."), ("", "goal ...")]


def test_it_is_the_whole_conversation_of_the_processor(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    made, expected = StreamCollator(model, processor, load=noise)([TALK.to_row()]), whole(processor, TALK, SPOKEN)
    assert made.keys() - {"labels"} == expected.keys()
    for name, value in expected.items():
        assert torch.equal(torch.as_tensor(made[name]), torch.as_tensor(value)), name


def test_labels_are_the_answers_and_their_ends(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    made = StreamCollator(model, processor, load=noise)([TALK.to_row(), ASKED.to_row()])
    labels, ids = made["labels"], made["input_ids"]
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    said = [processor.tokenizer.decode(row[row != -100]) for row in labels]
    assert said == ["Kick off ...<|im_end|> ...<|im_end|>goal ...<|im_end|>", " ...<|im_end|>She. ...<|im_end|>"]
    assert (made["attention_mask"].sum(1) == (ids != processor.tokenizer.pad_token_id).sum(1)).all()
    assert (labels[made["attention_mask"] == 0] == -100).all()


def test_a_batch_is_its_rows(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    collator = StreamCollator(model, processor, load=noise)
    both = collator([TALK.to_row(), ASKED.to_row()])
    with torch.no_grad():
        together = model(**both).logits
        for index, chunk in enumerate((TALK, ASKED)):
            alone = collator([chunk.to_row()])
            length = alone["input_ids"].shape[1]
            assert torch.equal(alone["input_ids"][0], both["input_ids"][index, :length])
            torch.testing.assert_close(model(**alone).logits[0], together[index, :length], rtol=1e-4, atol=1e-4)


def test_the_loss_depends_on_the_pictures(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    with torch.no_grad():
        one, other = (
            model(**StreamCollator(model, processor, load=load)([TALK.to_row()])).loss
            for load in (noise, lambda video, start, end: noise("z", start, end))
        )
    assert abs(one - other) > 1e-4


def test_what_came_before_is_one_answer_with_its_middle_left_out(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    long = " ".join(f"word{n}" for n in range(200))
    chunk = Chunk("a", 2, 5, "Say.", long, TALK.words)
    count = len(processor.tokenizer(long)["input_ids"])
    full = StreamCollator(model, processor, load=noise, text_sink=count, text_window=0)([chunk.to_row()])
    assert torch.equal(full["input_ids"], whole(processor, chunk, SPOKEN, long)["input_ids"])
    cut = StreamCollator(model, processor, load=noise, text_sink=20, text_window=30)([chunk.to_row()])
    gone = full["input_ids"].shape[1] - cut["input_ids"].shape[1]
    assert abs(gone - (count - 50)) <= 2
    labels = [made["labels"][made["labels"] != -100] for made in (full, cut)]
    assert torch.equal(*labels)


def test_videos_are_read_from_files(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny
    film(tmp_path / "a.mkv", 25, rate=5, size=(56, 56))
    chunk = Chunk("a.mkv", 2, 5, "Say.", "", TALK.words)
    made = StreamCollator(model, processor, root=tmp_path)([chunk.to_row()])
    assert made["video_grid_thw"].tolist() == [[1, 4, 4]] * 3
    late = Chunk("a.mkv", 4, 7, "Say.", "", ())
    with pytest.raises(ValueError, match=r"a\.mkv from 5 to 6 s; got none"):
        StreamCollator(model, processor, root=tmp_path)([late.to_row()])
    with pytest.raises(FileNotFoundError, match=r"none\.mkv"):
        StreamCollator(model, processor, root=tmp_path)([Chunk("none.mkv", 0, 1, "", "", ()).to_row()])


def test_the_text_side_is_trained_and_the_tower_is_not() -> None:
    model, _ = tiny_qwen2_5_vl()
    frozen = freeze_vision(model)
    assert frozen == sum(weight.numel() for weight in model.model.visual.parameters())
    assert not any(weight.requires_grad for weight in model.model.visual.parameters())
    assert all(weight.requires_grad for weight in model.model.language_model.parameters())
    assert model.lm_head.weight.requires_grad
    names = text_linears(model)
    assert len(names) == 2 * 7
    assert all(name.startswith("model.language_model.layers.") for name in names)


def test_what_cannot_be_collated(tiny: tuple[Any, Any]) -> None:
    from hf_longctx import UnsupportedError
    from hf_longctx.testing import tiny_llama

    model, processor = tiny
    with pytest.raises(UnsupportedError, match="vision-language model"):
        StreamCollator(tiny_llama(), processor)
    with pytest.raises(ValueError, match="fps >= 1"):
        StreamCollator(model, processor, fps=0.5)
    with pytest.raises(ValueError, match="at least 0"):
        StreamCollator(model, processor, text_sink=-1)
