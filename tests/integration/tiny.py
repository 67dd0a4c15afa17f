"""A tiny random model, and what the tests have to know about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import transformers as hf

VOCABULARY = 128


@dataclass(frozen=True)
class Case:
    """A model and what the tests have to know about it.

    Args:
        name: Unique; the family first.
        build: Makes the model, untouched.
        layers: Attention layers of the text decoder.
        kv_heads: KV heads of each of them.
        groups: Query heads per KV head.
        positions: How the model knows where a token is.
        rope: Rotary type as transformers names it, or None.
        rotary: Rotated share of the head's dimensions; 0 without rotary.
        sliding: Layers that attend to the last `WINDOW` tokens only, as the model itself defines it.
        nope: Layers of a rotary model that do not rotate.
        interface: Whether attention goes through transformers' registry of attention functions.
        text_config: Whether the text decoder's configuration is nested (vision-language models).
        remembers: Whether stock logits depend on the lengths that the same model object saw before (dynamic rotary
            keeps the frequencies of the longest input); compare such models only fresh against fresh.
        generates: Whether stock `generate` runs.
        refused: Why no method can take this model; None where methods can.
    """

    name: str
    build: Callable[[], hf.PreTrainedModel]
    layers: int = 2
    kv_heads: int = 2
    groups: int = 2
    positions: Literal["rotary", "alibi", "learned", "none"] = "rotary"
    rope: str | None = "default"
    rotary: float = 1.0
    sliding: tuple[int, ...] = ()
    nope: tuple[int, ...] = ()
    interface: bool = True
    text_config: bool = False
    remembers: bool = False
    generates: bool = True
    refused: str | None = None

    def make(self, seed: int = 0) -> hf.PreTrainedModel:
        """Return the model in eval mode; the same seed gives the same weights."""
        torch.manual_seed(seed)
        model = self.build().eval()
        if self.refused is None:
            _widen(model, seed)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0
        return model

    def prompt(self, tokens: int, rows: int = 1, seed: int = 1) -> torch.Tensor:
        """Return random token ids `[rows, tokens]` that avoid every special token."""
        return torch.randint(8, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def _widen(model: hf.PreTrainedModel, seed: int) -> None:
    """Draw weights with unit gain or more, and shift norms, biases and sinks off their neutral values."""
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter is embedding:
                parameter.copy_(noise)
            elif parameter.dim() > 1:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(noise * 0.2)
