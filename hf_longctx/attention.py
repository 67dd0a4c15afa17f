"""The one function that transformers calls: per head group, store the fresh tokens, attend over what is visible."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from .alike import attend_alike, order_of
from .cache.positions import lap_position
from .context import NAME, Forward, current
from .errors import UnsupportedError
from .group import Among, attend_group
from .kernels import ops
from .kernels.wide import picked, widened
from .layer import attend_layer
from .models import WANTS_MASK, spans_all


def register() -> None:
    """Make both functions known to transformers under our name; a model that has not our name never calls them."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def mask(**kwargs: Any) -> Tensor | None:
    """Registered with transformers in place of a mask: says no more than None, for `Step` knows what is padding.

    Raises:
        UnsupportedError: the model composed a mask that is more than causal, sliding and padding.
        RuntimeError: not inside a call of a patched model.
    """
    graphed = torch.compiler.is_compiling()
    forward = None if graphed else current()  # a graph would be made for this call alone
    family = kwargs["config"].model_type if forward is None else forward.facts.family
    if forward is None and not graphed:
        raise _missing(f"the mask of '{family}'")
    local = kwargs.get("local_size") is not None
    more = (
        not kwargs.get("allow_is_causal_skip", True) if local else kwargs["mask_function"] is not causal_mask_function
    )
    # While a stream is captured nobody can look whether positions begin again; the call before, which ran, was seen.
    if more and not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        raise UnsupportedError(
            f"hf_longctx: expected causal or sliding-window attention with padding in '{family}'; got a "
            "mask with more to it (packed sequences, blocks of image tokens, or a mask function). Unpatch the model."
        )
    return torch.empty(0, dtype=torch.bool) if family in WANTS_MASK else None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    hf_longctx: Forward | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as the plan says, for every layer of a patched model.

    Args:
        module: the attention module; its `layer_idx` names the layer.
        query: `[B, Hq, T, D]`.
        key: `[B, Hkv, T, D]`, fresh tokens only: the cache hands them through.
        value: `[B, Hkv, T, Dv]`, likewise.
        attention_mask: not read; padding is in the step.
        scaling: factor of the logits, 1/sqrt(D) if None.
        dropout: must be 0.
        hf_longctx: the call, put among the decoder's arguments by the patch.
        **kwargs: what the model adds; anything that changes the result is honoured or refused.

    Returns:
        `[B, T, Hq, D]` and None: weights are never formed.

    Raises:
        UnsupportedError: an argument that changes the result and is not known here; or, later, a backward pass through
            a filled cache.
        RuntimeError: not inside a call of a patched model.
    """
    layer, name = int(module.layer_idx), type(module).__name__  # type: ignore[arg-type]
    if torch.compiler.is_compiling():
        from .graphed import attention as in_graph

        return in_graph(name, layer, query, key, value, scaling, dropout, kwargs), None
    return attend(hf_longctx or current(), name, layer, query, key, value, scaling, dropout, kwargs), None


def attend(
    forward: Forward | None,
    name: str,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    others: Mapping[str, Any],
) -> Tensor:
    """`attention` of the layer of that number in a call; `name` and `others` are the module's class and `kwargs`."""
    if forward is None:
        raise _missing(name)
    logits = _logits(name, forward, layer, query, scaling, dropout, others)
    if forward.probe is not None:
        forward.probe[layer] = (query, key)
        return query.new_zeros(query.shape[0], *query.shape[2:0:-1], value.shape[-1])
    if forward.cache is not None:
        if ("attended", layer) in forward.memo:
            raise UnsupportedError(
                f"attention: expected each layer to attend once in a call, which stores its tokens; got another call "
                f"in layer {layer} ({name}). Unpatch the model."
            )
        forward.memo["attended", layer] = True
    plan = forward.plan.layers[layer]
    if key.shape[1] != plan.kv_heads:
        raise ValueError(
            f"attention: expected {plan.kv_heads} KV heads in layer {layer} of plan '{forward.plan.method}'; got "
            f"{key.shape[1]}. Make the plan for this model."
        )
    if not forward.texts:
        return _attend(forward, layer, query, key, value, logits)
    rows: list[list[Tensor]] = [[] for _ in query]
    for text in forward.texts:
        q, k, v = (x[text.row : text.row + 1, :, text.columns] for x in (query, key, value))
        rows[text.row].append(_attend(text.forward, layer, q, k, v, logits))
    return torch.cat([torch.cat(parts, 1) for parts in rows])


def _attend(forward: Forward, layer: int, query: Tensor, key: Tensor, value: Tensor, logits: ops.Logits) -> Tensor:
    """Group of heads by group of heads: `[B, T, Hq, D]`."""
    plan = forward.plan.layers[layer]
    stores = [None] * len(plan.groups) if forward.cache is None else forward.cache.stacks[layer].stores
    at_once = attend_layer(forward, layer, stores, query, key, value, logits)
    if at_once is not None:
        return at_once
    if len(plan.groups) == 1:
        out = attend_group(forward, layer, plan.groups[0], stores[0], query, key, value, logits)
        assert out is not None
        return out.transpose(1, 2).contiguous()
    order = order_of(tuple(group.kv_heads for group in plan.groups), query.shape[1] // key.shape[1], query.device)
    if forward.cache is not None:
        beside = attend_alike(forward, layer, stores, order, query, key, value, logits)
        if beside is not None:
            return beside.transpose(1, 2).contiguous()
    k, v = order.split(key), order.split(value)
    # of all heads, `[B, T, Hq, D]`: made when the first group puts its own in there
    whole = cache(lambda: query.new_empty(query.shape[0], *query.shape[2:0:-1], value.shape[-1]))
    parts: dict[int, Tensor] = {}
    for i, group in enumerate(plan.groups):
        among, own = Among(order.places[i], lambda: whole().transpose(1, 2)), logits.heads(order.q[i])
        part = attend_group(forward, layer, group, stores[i], query, k[i], v[i], own, among)
        if part is not None:
            parts[i] = part.transpose(1, 2)
    if len(parts) == len(plan.groups):
        return picked(torch.cat(list(parts.values()), 2), 2, order.back)
    for i, part in parts.items():
        into, some = widened(whole(), part)
        into.index_copy_(2, order.q[i], some)
    return whole()


def text_positions(forward: Forward) -> Tensor:
    """`[B or 1, T]`, int64: the lap positions at which the model shall rotate this call's tokens."""
    assert forward.plan.lap is not None
    if forward.texts:
        return torch.cat([text_positions(text.forward) for text in forward.texts], 1).view(-1, forward.step.tokens)
    return lap_position(forward.step.pos_in_text, forward.plan.sink, forward.plan.lap)


HARMLESS = frozenset(
    {
        "position_ids",
        "use_cache",
        "output_hidden_states",
        "output_router_logits",
        "cache_position",
        "position_embeddings",
        "num_items_in_batch",
        "logits_to_keep",
    }
)
"""Arguments that models hand down and that do not change attention."""


def _logits(
    name: str,
    forward: Forward,
    layer: int,
    query: Tensor,
    scaling: float | None,
    dropout: float,
    kwargs: Mapping[str, Any],
) -> ops.Logits:
    """From products to logits as this model has it, after a check of every argument."""
    own_window = forward.facts.layers[layer].window
    expected: dict[str, Any] = {"is_causal": True, "output_attentions": False, "sliding_window": own_window}
    if dropout:
        raise _unknown(name, layer, "dropout", dropout, "set attention_dropout=0 in the configuration")
    for key, value in kwargs.items():
        if key in ("softcap", "s_aux", "slopes") or key in HARMLESS or value is None:
            continue
        if key == "sliding_window" and own_window is None and spans_all(forward.facts.config, value):
            continue
        if key not in expected or value != expected[key]:
            raise _unknown(name, layer, key, value, "unpatch the model for this input")
    if own_window is not None and kwargs.get("sliding_window") is None:
        remedy = f"unpatch the model, whose cache has a window of {own_window} tokens there"
        raise _unknown(name, layer, "sliding_window", None, remedy)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    sinks = _zeros(forward, query) if forward.plan.zero_sink else kwargs.get("s_aux")
    return ops.Logits(float(scale), kwargs.get("softcap"), sinks, kwargs.get("slopes"))


def _zeros(forward: Forward, query: Tensor) -> Tensor:
    """`[Hq]`, float32: logits that add exp(0) = 1 to each denominator, the same for all layers of as many heads."""
    heads, device = query.shape[1], query.device
    zeros: Tensor = forward.once(("zero_sink", heads, device), lambda: torch.zeros(heads, device=device))
    return zeros


def _unknown(kind: str, layer: int, name: str, value: Any, remedy: str) -> UnsupportedError:
    shown = f"{type(value).__name__} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return UnsupportedError(
        f"attention: expected arguments that are known to be honoured in layer {layer} ({kind}); got "
        f"{name}={shown}. To go on, {remedy}."
    )


def _missing(where: str) -> RuntimeError:
    return RuntimeError(
        f"hf_longctx: expected {where} to run inside a call of a patched model; got attn_implementation='{NAME}' "
        "outside: it was set by hand, or a layer runs by itself. Call hf_longctx.patch(model, method), then the model."
    )
