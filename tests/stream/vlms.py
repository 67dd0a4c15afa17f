"""Tiny random vision-language models of every family that streams, each with its own processor, made in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from hf_longctx.streaming.frames import Frame
from hf_longctx.streaming.session import Session

from ..integration.tiny import _widen
from ..operators import HAS_TORCHVISION, needs_torchvision

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'text' %}{{ c.text }}"
    "{% elif c.type == 'video' %}VIDEO{% else %}IMAGE{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As the published templates of these families, without what they do for tools."""

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<image>",
    "<video>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<img>",
    "</img>",
    "<IMG_CONTEXT>",
    *(f"<row_{i}_col_{j}>" for i in range(1, 3) for j in range(1, 3)),
]


def tokenizer(**named: str) -> hf.PreTrainedTokenizerFast:
    """One token for each byte, and the special ones; `named` are attributes that a processor looks for."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made = hf.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|endoftext|>", padding_side="left")
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    for name, token in named.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    return made


WORDS = tokenizer()
ID = {token: WORDS.convert_tokens_to_ids(token) for token in SPECIAL}
VOCABULARY = len(WORDS)

TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": ID["<|im_end|>"],
    "pad_token_id": ID["<|endoftext|>"],
}


@dataclass(frozen=True)
class Vlm:
    """A family.

    Args:
        name: `config.model_type`.
        build: makes the model; with a number of text layers.
        processor: makes the processor.
    """

    name: str
    build: Callable[[int], Any]
    processor: Callable[[], Any]

    def make(self, layers: int = 2) -> tuple[Any, Any]:
        """Model and processor; the same weights every time."""
        torch.manual_seed(0)
        model = self.build(layers).eval()
        assert model.config.model_type == self.name
        _widen(model, 0)
        return model, self.processor()


def _qwen(name: str, vision: Mapping[str, Any], **text: Any) -> Callable[[int], Any]:
    def build(layers: int) -> Any:
        rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 3, 3]}
        config = getattr(hf, f"{name}Config")(
            text_config={**TEXT, "num_hidden_layers": layers, "rope_parameters": rope, **text},
            vision_config={"depth": 1, "num_heads": 2, **vision},
            image_token_id=ID["<|image_pad|>"],
            video_token_id=ID["<|video_pad|>"],
            vision_start_token_id=ID["<|vision_start|>"],
            vision_end_token_id=ID["<|vision_end|>"],
            tie_word_embeddings=False,
        )
        return getattr(hf, f"{name}ForConditionalGeneration")(config)

    return build


def _qwen_processor(name: str, video: str, patch: int) -> Callable[[], Any]:
    def build() -> Any:
        size = {"shortest_edge": (2 * patch) ** 2, "longest_edge": 32 * (2 * patch) ** 2}
        template = CHATML.replace("VIDEO", "<|vision_start|><|video_pad|><|vision_end|>")
        template = template.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
        return getattr(hf, f"{name}Processor")(
            hf.Qwen2VLImageProcessor(size=size, patch_size=patch),
            tokenizer(),
            getattr(hf, f"{video}VideoProcessor")(size=size, patch_size=patch),
            chat_template=template,
        )

    return build


def _siglip(size: int, patch: int) -> dict[str, Any]:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {**sizes, "image_size": size, "patch_size": patch}


def _smolvlm(layers: int) -> Any:
    config = hf.SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama", "num_hidden_layers": layers},
        vision_config=_siglip(32, 8),
        scale_factor=2,
        image_token_id=ID["<image>"],
        pad_token_id=ID["<|endoftext|>"],
        tie_word_embeddings=False,
    )
    return hf.SmolVLMForConditionalGeneration(config)


def _smolvlm_processor() -> Any:
    size, longest = {"longest_edge": 32}, {"longest_edge": 32}
    images = hf.SmolVLMImageProcessor(size=size, max_image_size=longest, do_image_splitting=False)
    videos = hf.SmolVLMVideoProcessor(size=size, max_image_size=longest)
    template = CHATML.replace("VIDEO", "<video>").replace("IMAGE", "<image>")
    return hf.SmolVLMProcessor(images, tokenizer(), videos, image_seq_len=4, chat_template=template)


def _llava_onevision(layers: int) -> Any:
    config = hf.LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2", "num_hidden_layers": layers},
        vision_config={"model_type": "siglip_vision_model", **_siglip(32, 8)},
        image_token_id=ID["<image>"],
        video_token_id=ID["<video>"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[32, 32]],
        tie_word_embeddings=False,
    )
    return hf.LlavaOnevisionForConditionalGeneration(config)


def _llava_onevision_processor() -> Any:
    size = {"height": 32, "width": 32}
    return hf.LlavaOnevisionProcessor(
        hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[32, 32]]),
        tokenizer(),
        hf.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=CHATML.replace("VIDEO", "<video>").replace("IMAGE", "<image>"),
    )


def _internvl(layers: int) -> Any:
    config = hf.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2", "num_hidden_layers": layers},
        vision_config={**_siglip(32, 8), "image_size": [32, 32], "patch_size": [8, 8], "use_qk_norm": True},
        image_token_id=ID["<IMG_CONTEXT>"],
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return hf.InternVLForConditionalGeneration(config)


def _internvl_processor() -> Any:
    size = {"height": 32, "width": 32}
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    return hf.InternVLProcessor(
        hf.GotOcr2ImageProcessor(size=size, crop_to_patches=False),
        tokenizer(**names, video_token="<video>"),
        hf.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=CHATML.replace("VIDEO", "<video>").replace("IMAGE", "<IMG_CONTEXT>"),
    )


def _idefics3(layers: int) -> Any:
    config = hf.Idefics3Config(
        text_config={**TEXT, "model_type": "llama", "num_hidden_layers": layers},
        vision_config=_siglip(32, 8),
        scale_factor=2,
        image_token_id=ID["<image>"],
        pad_token_id=ID["<|endoftext|>"],
        tie_word_embeddings=False,
    )
    return hf.Idefics3ForConditionalGeneration(config)


def _idefics3_processor() -> Any:
    images = hf.Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    template = CHATML.replace("IMAGE", "<image>")
    return hf.Idefics3Processor(images, tokenizer(), image_seq_len=4, chat_template=template)


VLMS = (
    Vlm(
        "qwen2_vl",
        _qwen("Qwen2VL", {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 1, "patch_size": 8}),
        _qwen_processor("Qwen2VL", "Qwen2VL", 8),
    ),
    Vlm(
        "qwen2_5_vl",
        _qwen(
            "Qwen2_5_VL",
            {
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 32,
                "fullatt_block_indexes": [0],
                "patch_size": 8,
                "tokens_per_second": 2,
            },
        ),
        _qwen_processor("Qwen2_5_VL", "Qwen2VL", 8),
    ),
    Vlm(
        "qwen3_vl",
        _qwen(
            "Qwen3VL",
            {
                "hidden_size": 32,
                "out_hidden_size": 64,
                "intermediate_size": 32,
                "deepstack_visual_indexes": [0],
                "patch_size": 8,
            },
            head_dim=16,
        ),
        _qwen_processor("Qwen3VL", "Qwen3VL", 8),
    ),
    Vlm("llava_onevision", _llava_onevision, _llava_onevision_processor),
    Vlm("smolvlm", _smolvlm, _smolvlm_processor),
    Vlm("internvl", _internvl, _internvl_processor),
    Vlm("idefics3", _idefics3, _idefics3_processor),
)
BY_NAME = {vlm.name: vlm for vlm in VLMS}

ANY = "qwen2_5_vl" if HAS_TORCHVISION else "idefics3"
"""A family for tests of what all have in common."""


def families(*names: str) -> list[Any]:
    """Parameters of a test: families by name, all if none is given; those that cannot be made here are skipped."""
    return [pytest.param(name, marks=() if name == "idefics3" else needs_torchvision) for name in names or BY_NAME]


def clip(rounds: float, fps: float = 2, size: tuple[int, int] = (24, 32), seed: int = 0, t: float = 0.0) -> list[Frame]:
    """Noise, so many seconds of it."""
    made = torch.Generator().manual_seed(seed)
    return [
        Frame(t + i / fps, torch.randint(0, 256, (*size, 3), dtype=torch.uint8, generator=made))
        for i in range(round(rounds * fps))
    ]


class Watched:
    """A session whose calls are noted.

    Attributes:
        seen: what the vision tower read, by round.
        logits: `[B, V]`, of the last call.
    """

    def __init__(self, session: Session) -> None:
        self.session, self.seen, self.logits = session, [], torch.empty(0)
        encode, forward = session.engine.chat.encode, session.engine.reader.forward

        def encoded(turns: Any) -> Any:
            out = encode(turns)
            if out.vision:
                self.seen.append(out.vision)
            return out

        def forwarded(*args: Any, **kwargs: Any) -> Any:
            self.logits = forward(*args, **kwargs)
            return self.logits

        session.engine.chat.encode = encoded
        session.engine.reader.forward = forwarded

    def kept(self, row: int = 0) -> list[int]:
        """Tokens in the cache."""
        return [token for held in self.session.engine.rows[row].spans for token in held.ids]

    def inputs(self, row: int = 0) -> dict[str, Any]:
        """What the stock model needs to read all that is kept from the beginning; of a session of one stream."""
        ids = torch.tensor([self.kept(row)])
        config = self.session.engine.model.config
        vision: dict[str, list[Any]] = {}
        for held in self.session.engine.rows[row].spans:
            if held.kind == "vision":
                for name, x in self.seen[held.number].items():
                    vision.setdefault(name, []).append(torch.as_tensor(x))
        axis = 1 if config.model_type in ("smolvlm", "idefics3") else 0
        joined = {name: torch.cat(xs, axis) for name, xs in vision.items()}
        kinds = {}
        if hasattr(self.session.engine.model.model, "get_rope_index"):
            of = {config.image_token_id: 1, config.video_token_id: 2}
            kinds["mm_token_type_ids"] = torch.tensor([[of.get(token, 0) for token in self.kept(row)]]).int()
        return {"input_ids": ids, **joined, **kinds}
