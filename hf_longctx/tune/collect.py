"""Run a model over texts and see, layer by layer, where its heads really look, and where antidiagonals say they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import UnsupportedError
from ..kernels import ops
from ..models import ADAPTED, ModelFacts, decoder_of, inspect_model
from .xattention import Curve, at_coverage, curves, joined

_NAME = "hf_longctx_tune"


@dataclass(frozen=True)
class Findings:
    """What was seen of every query head of every layer with full attention.

    Attributes:
        curves: by layer, one for each query head, over all texts.
        at_coverage: by layer, `[Hq]`, the largest over the texts.
    """

    curves: dict[int, list[Curve]]
    at_coverage: dict[int, list[float]]


@torch.no_grad()
def collect(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    stride: int,
    block: int,
    coverage: float,
    advance: Callable[[], Any] = lambda: None,
) -> Findings:
    """Look at every query head on every text.

    Nothing of size T * T is held for more than one block of queries of one KV head. What remains of a text is 16 bytes
    per head and pair of blocks.

    Args:
        model: an unpatched decoder; it is as it was afterwards.
        texts: each `[T]`, int64, in whole blocks, at least three.
        stride: tokens of a tile.
        block: tokens of a block.
        coverage: as in `at_coverage`.
        advance: called after every layer of every text.

    Raises:
        UnsupportedError: attention of the family cannot be looked at.
        ValueError: a text that is not in whole blocks.
    """
    decoder, _ = decoder_of(model)
    facts = inspect_model(model)
    if facts.family in ADAPTED:
        raise UnsupportedError(
            f"tune: expected a model whose attention goes through transformers' interface; got '{facts.family}'. "
            "Use one threshold for all heads, such as XAttention(tau=0.9)."
        )
    seen: dict[int, list[list[Curve]]] = {}
    shares: dict[int, list[Any]] = {}

    def look(layer: int, mass: Tensor, score: Tensor) -> None:
        both = [x.double().cpu().numpy() for x in (mass, score)]
        seen.setdefault(layer, []).append(curves(both[0], both[1]))
        shares.setdefault(layer, []).append(at_coverage(both[0], both[1], coverage))

    with _attending(decoder, partial(_attend, facts, stride, block, look, advance)):
        for ids in texts:
            if len(ids) % block or len(ids) < 3 * block:
                raise ValueError(
                    f"tune: expected texts in whole blocks of {block} tokens, at least three; got {len(ids)}. "
                    f"Use a length of {max(3, len(ids) // block) * block}."
                )
            decoder(input_ids=ids[None].to(decoder.device), use_cache=False)
    return Findings(
        {layer: [joined(head) for head in zip(*parts, strict=True)] for layer, parts in seen.items()},
        {layer: np.max(parts, axis=0).tolist() for layer, parts in shares.items()},
    )


@contextmanager
def _attending(decoder: Any, function: Callable[..., Any]) -> Iterator[None]:
    """Let a decoder attend by a function of ours; its name is unknown to masks, so that none is made."""
    before, training = decoder.config._attn_implementation_internal, decoder.training
    ALL_ATTENTION_FUNCTIONS[_NAME] = function
    decoder.config._attn_implementation_internal = _NAME
    decoder.train(False)
    try:
        yield
    finally:
        decoder.train(training)
        decoder.config._attn_implementation_internal = before
        ALL_ATTENTION_FUNCTIONS.pop(_NAME)


def _attend(
    facts: ModelFacts,
    stride: int,
    block: int,
    look: Callable[[int, Tensor, Tensor], None],
    advance: Callable[[], Any],
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer, q `[1, Hq, T, D]`: attention, and what it did."""
    layer = int(module.layer_idx)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    window = facts.layers[layer].window
    out, mass = attend(q[0], k[0], v[0], block, ops.Logits(scale, softcap, s_aux), window)
    if window is None:
        places = torch.arange(q.shape[2], device=q.device)[None]
        score = ops.score_antidiagonal(q, k, places, block, stride, scale, True)
        look(layer, mass, score[0])
    advance()
    return out.transpose(0, 1)[None].to(q.dtype).contiguous(), None


def attend(
    q: Tensor, k: Tensor, v: Tensor, block: int, logits: ops.Logits, window: int | None
) -> tuple[Tensor, Tensor]:
    """Causal attention of one text, and how much each block of queries pays to each block of keys.

    Args:
        q: `[Hq, T, D]`, T in whole blocks.
        k: `[Hkv, T, D]`.
        v: `[Hkv, T, Dv]`.
        block: tokens of a block.
        logits: from products to logits.
        window: of the layer, in tokens.

    Returns:
        `[Hq, T, Dv]`, and `[Hq, N, N]`, the mean over the queries of a block; both float32. A row adds up to 1, or to
        less where learned sinks take part.
    """
    per_kv, tokens = q.shape[0] // k.shape[0], q.shape[1]
    out = torch.empty(q.shape[0], tokens, v.shape[2], device=q.device)
    mass = torch.zeros(q.shape[0], tokens // block, tokens // block, device=q.device)
    for kv_head in range(k.shape[0]):
        mine = slice(kv_head * per_kv, (kv_head + 1) * per_kv)
        keys, values = k[kv_head].float(), v[kv_head].float()
        sinks = None if logits.sink_logits is None else logits.sink_logits[mine]
        for n in range(tokens // block):
            stop = (n + 1) * block
            part = q[mine, n * block : stop].float()
            weights = _weights(part, keys[:stop], logits, sinks, window)
            out[mine, n * block : stop] = weights @ values[:stop]
            mass[mine, n, : n + 1] = weights.view(per_kv, block, n + 1, block).sum(3).mean(1)
    return out, mass


def _weights(q: Tensor, k: Tensor, logits: ops.Logits, sinks: Tensor | None, window: int | None) -> Tensor:
    """Softmax of the last queries `[G, Q, D]` over all keys `[S, D]` so far: `[G, Q, S]`."""
    x = q @ k.T * logits.scale
    if logits.softcap is not None:
        x = logits.softcap * torch.tanh(x / logits.softcap)
    distance = torch.arange(len(k) - q.shape[1], len(k), device=q.device)[:, None] - torch.arange(
        len(k), device=q.device
    )
    x = x.masked_fill((distance < 0) | (distance >= (window or len(k))), -math.inf)
    if sinks is not None:
        x = torch.cat((x, sinks.float()[:, None, None].expand(-1, q.shape[1], 1)), -1)
    return x.softmax(-1)[..., : len(k)]
