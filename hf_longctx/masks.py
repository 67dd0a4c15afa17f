"""The mask of a call: padding is honoured, and whatever else it says is refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError

_SLIDING = "sliding_attention"
_KINDS = {"full_attention", _SLIDING}


def find_padding(decoder: Any, kwargs: dict[str, Any], tokens: int) -> Tensor | None:
    """`[B, columns + tokens]`, 1 for real tokens, or None where all are; put among the arguments.

    Models around the decoder may have made its masks already (Gemma 3's with pictures does). Where these say no more
    than padding, causality and the decoder's own windows, they come to the same.

    Args:
        decoder: of the call.
        kwargs: its arguments.
        tokens: of the call, in each row.

    Raises:
        UnsupportedError: attention weights are asked for, or a mask says more.
    """
    if kwargs.get("output_attentions") or getattr(decoder.config, "output_attentions", False):
        raise UnsupportedError(
            "hf_longctx: expected output_attentions=False, because attention weights are never formed; got True. "
            "Unpatch the model to look at them."
        )
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict) and mask.keys() <= _KINDS:
        mask = kwargs["attention_mask"] = _of_kinds(mask, decoder.config, tokens)
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    shown = f"{mask.ndim}-D" if isinstance(mask, Tensor) else type(mask).__name__
    raise UnsupportedError(
        f"hf_longctx: expected attention_mask as [B, T] (1 for real tokens) or None; got a {shown} mask. "
        "Unpatch the model for masks of another form."
    )


def _of_kinds(masks: dict[str, Any], config: Any, tokens: int) -> Tensor | None:
    """The padding in masks by type of layer, each None, `[B, S]` or `[B, 1, T, S]` (True or 0 for what is seen)."""
    given: dict[str, Tensor] = {kind: mask for kind, mask in masks.items() if mask is not None}
    for mask in given.values():
        if mask.ndim == 2:
            return mask
    if not given:
        return None
    seen = {kind: (mask == 0 if mask.is_floating_point() else mask.bool())[:, 0] for kind, mask in given.items()}
    whole = seen.get("full_attention")  # None: such layers are not masked, so that nothing is padding
    real = torch.ones_like(next(iter(seen.values()))[:, -1]) if whole is None else whole[:, -1]
    if tokens > 1:  # a single query sees what is behind it, of which nothing is hidden but padding
        for kind, mask in seen.items():
            _check_plain(mask, real, config.sliding_window if kind == _SLIDING else None)
    return real


def _check_plain(seen: Tensor, real: Tensor, window: int | None) -> None:
    """Refuse `[B, T, S]` where a real token sees more or less than all real ones before it in its window."""
    tokens, end = seen.shape[1:]
    queries = torch.arange(end - tokens, end, device=seen.device)[:, None]
    keys = torch.arange(end, device=seen.device)
    causal = keys <= queries
    if window is not None:
        causal &= keys > queries - window
    differ = (seen != (causal & real[:, None])) & real[:, end - tokens :, None]
    if bool(differ.any()):
        raise UnsupportedError(
            "hf_longctx: expected a mask of padding, causality and the model's own windows; got one with more to it "
            "(blocks of image tokens or a prefix that are read in both directions). Unpatch the model for this input."
        )
