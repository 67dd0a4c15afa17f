"""The one function that transformers calls: per head group, store the fresh tokens, attend over what is visible."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from .cache.positions import lap_position, sink_position
from .cache.step import Step
from .cache.store import View
from .context import NAME, Forward, current
from .errors import UnsupportedError
from .kernels import ops
from .models import WANTS_MASK, spans_all
from .plan import HeadGroup, Retention


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
    forward = current()
    if forward is None:
        raise _missing(f"the mask of '{kwargs['config'].model_type}'")
    local = kwargs.get("local_size") is not None
    if not kwargs.get("allow_is_causal_skip", True) if local else kwargs["mask_function"] is not causal_mask_function:
        raise UnsupportedError(
            f"hf_longctx: expected causal or sliding-window attention with padding in '{forward.facts.family}'; got a "
            "mask with more to it (packed sequences, blocks of image tokens, or a mask function). Unpatch the model."
        )
    return torch.empty(0, dtype=torch.bool) if forward.facts.family in WANTS_MASK else None


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
    forward = hf_longctx or current()
    if forward is None:
        raise _missing(type(module).__name__)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    logits = _logits(module, forward, layer, query, scaling, dropout, kwargs)
    if forward.probe is not None:
        forward.probe[layer] = (query, key)
        return query.new_zeros(query.shape[0], *query.shape[2:0:-1], value.shape[-1]), None
    plan = forward.plan.layers[layer]
    if key.shape[1] != plan.kv_heads:
        raise ValueError(
            f"attention: expected {plan.kv_heads} KV heads in layer {layer} of plan '{forward.plan.method}'; got "
            f"{key.shape[1]}. Make the plan for this model."
        )
    stores = [None] * len(plan.groups) if forward.cache is None else forward.cache.stacks[layer].stores
    if len(plan.groups) == 1:
        out = _attend_group(forward, layer, plan.groups[0], stores[0], query, key, value, logits)
        return out.transpose(1, 2).contiguous(), None
    out = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
    for group, store in zip(plan.groups, stores, strict=True):
        q_heads, kv_heads = _heads(group.kv_heads, query.shape[1] // key.shape[1], query.device)
        part = query[:, q_heads], key[:, kv_heads], value[:, kv_heads], logits.heads(q_heads)
        out.index_copy_(2, q_heads, _attend_group(forward, layer, group, store, *part).transpose(1, 2))
    return out, None


def _attend_group(
    forward: Forward,
    layer: int,
    group: HeadGroup,
    stored: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    logits: ops.Logits,
) -> Tensor:
    """Append, attend, evict for one group of heads: `[B, Hq', T, D]`."""
    step = forward.step.on(q.device)
    if step.order is not None:
        q, k, v = (ops.take_tokens(x, step.order) for x in (q, k, v))
    view = View(k, v, step.pos if step.ragged else None) if stored is None else stored[1].append(k, v, step)
    retention = group.policy.retention
    window = retention.reach(step.tokens)
    see = ops.Visibility(retention.sink, window, None if view.k_pos is None else step.pos, view.k_pos)
    floor = _floor(forward, retention, stored, q.device)
    if floor is not None:
        see = _above(see, floor, view, step)
    turns = _turns(forward, layer, group, step, floor)
    few = step.tokens == 1 and step.columns > 0
    out = (ops.attend_pages if few else ops.attend_blocks)(q, view.k, view.v, logits, see, turns)
    if step.columns and torch.is_grad_enabled():
        out = _Stored.apply(out, q, k, v)  # type: ignore[no-untyped-call]
    return out if step.restore is None else ops.take_tokens(out, step.restore)


class _Stored(torch.autograd.Function):
    """The result of attention over a filled cache: keys and values were read back from it, cut off from their gradient.

    To decode without `no_grad` is common and works; to go backward through it would give a part of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, *fresh: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedError(
            "hf_longctx: expected a backward pass through one call on a whole text; got one through a call that went "
            "on from a filled cache, whose keys and values carry no gradient. Pass the text in one call."
        )


def _floor(forward: Forward, retention: Retention, stored: Any, device: torch.device) -> Tensor | None:
    """`[B or 1, 1]`, oldest position outside the sinks neither evicted by hand nor lost; None: all there."""
    evicted = None if forward.cache is None else forward.cache.floors.get(retention)
    lost = None if stored is None else stored[1].floor
    both = [floor.to(device) for floor in (evicted, lost) if floor is not None]
    return torch.maximum(both[0], both[-1]) if both else None


def _above(see: ops.Visibility, floor: Tensor, view: View, step: Step) -> ops.Visibility:
    """The same without the tokens that were evicted by hand."""
    k_pos = torch.arange(view.k.shape[2], device=floor.device)[None] if view.k_pos is None else view.k_pos
    k_pos = torch.where((k_pos < see.sink) | (k_pos >= floor), k_pos, -1)
    return ops.Visibility(see.sink, see.window, step.pos, k_pos)


def _turns(forward: Forward, layer: int, group: HeadGroup, step: Step, floor: Tensor | None) -> ops.Turns | None:
    """How this group's queries are turned; None while every key stands where the text has it."""
    plan, retention, lap = forward.plan, group.policy.retention, forward.plan.lap
    reach = retention.reach(step.tokens)
    if lap is None or reach is None:
        return None
    straight = plan.sink + lap if retention.sink == 0 else min(plan.sink + lap, retention.sink + reach)
    if floor is None and step.columns + step.tokens <= straight:
        return None
    key = (retention, step.device)
    if key not in forward.memo:
        moved = None if floor is None else floor.to(step.device)
        forward.memo[key] = sink_position(step.pos, retention.sink, reach, moved)
    rotary = forward.rotary[layer]
    return ops.Turns(forward.memo[key], lap, plan.sink, rotary.inv_freq, rotary.interleaved)


def text_positions(forward: Forward) -> Tensor:
    """`[B or 1, T]`, int64: the lap positions at which the model shall rotate this call's tokens."""
    assert forward.plan.lap is not None
    return lap_position(forward.step.pos_in_text, forward.plan.sink, forward.plan.lap)


@lru_cache(maxsize=4096)
def _heads(kv_heads: tuple[int, ...], per_kv: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Query and KV heads of a group, as indices on the device; made once, as making them waits for the device."""
    kv = torch.tensor(kv_heads, device=device)
    return (kv[:, None] * per_kv + torch.arange(per_kv, device=device)).flatten(), kv


_HARMLESS = frozenset(
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
    module: nn.Module,
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
        raise _unknown(module, layer, "dropout", dropout, "set attention_dropout=0 in the configuration")
    for name, value in kwargs.items():
        if name in ("softcap", "s_aux", "slopes") or name in _HARMLESS or value is None:
            continue
        if name == "sliding_window" and own_window is None and spans_all(forward.facts.config, value):
            continue
        if name not in expected or value != expected[name]:
            raise _unknown(module, layer, name, value, "unpatch the model for this input")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    return ops.Logits(float(scale), kwargs.get("softcap"), kwargs.get("s_aux"), kwargs.get("slopes"))


def _unknown(module: nn.Module, layer: int, name: str, value: Any, remedy: str) -> UnsupportedError:
    shown = f"{type(value).__name__} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return UnsupportedError(
        f"attention: expected arguments that are known to be honoured in layer {layer} ({type(module).__name__}); got "
        f"{name}={shown}. To go on, {remedy}."
    )


def _missing(where: str) -> RuntimeError:
    return RuntimeError(
        f"hf_longctx: expected {where} to run inside a call of a patched model; got attn_implementation='{NAME}' "
        "outside: it was set by hand, or a layer runs by itself. Call hf_longctx.patch(model, method), then the model."
    )
