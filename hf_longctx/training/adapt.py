"""Which weights of a vision-language model are trained for streams: the text side; the vision tower is frozen."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..models import decoder_of


def text_linears(model: Any) -> list[str]:
    """Names of the linear layers of the text decoder, as `LoraConfig(target_modules=...)` takes them."""
    decoder, _ = decoder_of(model)
    inside = set(decoder.modules())
    return [name for name, module in model.named_modules() if module in inside and isinstance(module, nn.Linear)]


def freeze_vision(model: Any) -> int:
    """Freeze whatever is neither the text decoder nor the head: tower and projector.

    Paper: StreamingVLM (arXiv:2510.09608) §4.1: the vision encoder is frozen, the language model is trained in full.

    Returns:
        How many weights were frozen.
    """
    decoder, base = decoder_of(model)
    head: Any = base.get_output_embeddings()  # type: ignore[no-untyped-call]
    text = {id(weight) for part in (decoder, head) if part is not None for weight in part.parameters()}
    frozen = [weight for weight in model.parameters() if id(weight) not in text]
    for weight in frozen:
        weight.requires_grad_(False)
    return sum(weight.numel() for weight in frozen)
