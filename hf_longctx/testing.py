"""An oracle for tests and notebooks: what every query sees, token by token, and a model run on it in float64.

Nothing here comes from `cache/` or `kernels/`. The oracle follows the rule as the StreamingLLM authors state it: for
every query, each visible key is rotated afresh at its place among the visible keys. It is slow, and for tiny models.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .plan import HeadPolicy, Plan

_NAME = "hf_longctx_oracle"
_INTERLEAVED = ("cohere", "cohere2", "glm", "glm4")
"""Families that rotate channels (2i, 2i + 1) together, not (i, i + R/2)."""


# what is seen ---------------------------------------------------------------------------------------------------------


def key_positions(
    policy: HeadPolicy,
    calls: Sequence[int],
    real: Tensor | None = None,
    rooms: Mapping[int, int] | None = None,
) -> Tensor:
    """At which position each query reads each key of one row, for one policy.

    Args:
        policy: what the head does.
        calls: columns of each call of the model, in order; together C.
        real: `[C]`, nonzero for real tokens; None: all are.
        rooms: `{i: n}` stands for `evict(cache, room=n)` before call `i`.

    Returns:
        `[C, C]`, int64: query column, key column; -1 where the key is not seen; on the diagonal the query itself.
    """
    keep, sink, in_cache = policy.retention, policy.retention.sink, policy.positions.in_cache
    total = sum(calls)
    out = torch.full((total, total), -1, dtype=torch.int64)
    index: dict[int, int] = {}  # of a column's token in its row
    held: list[int] = []  # columns whose tokens are stored
    start = 0
    for number, columns in enumerate(calls):
        if in_cache and rooms and number in rooms:
            assert keep.window is not None
            held = _kept(held, index, sink, keep.window - rooms[number])
        fresh = [c for c in range(start, start + columns) if real is None or bool(real[c])]
        index.update({c: len(index) + i for i, c in enumerate(fresh)})
        reach = keep.reach(columns)
        for query in fresh:
            seen = _kept([c for c in held + fresh if c <= query], index, sink, reach)
            places = range(len(seen)) if in_cache else [index[c] for c in seen]
            out[query, seen] = torch.tensor(list(places))
        held = _kept(held + fresh, index, sink, reach)
        start += columns
    return out


def _kept(columns: list[int], index: Mapping[int, int], sink: int, window: int | None) -> list[int]:
    """Those among `columns` that are sinks or among the last `window` tokens of the row, up to the last of `index`."""
    last = max((index[c] for c in columns), default=0)
    return [c for c in columns if window is None or index[c] < sink or last - index[c] < window]


def masks(
    plan: Plan, calls: Sequence[int], real: Tensor | None = None, rooms: Mapping[int, int] | None = None
) -> list[Tensor]:
    """Which key each query of one row sees: per layer `[Hkv, C, C]`, bool; arguments as `key_positions`."""
    out = []
    for layer in plan.layers:
        seen = torch.zeros(layer.kv_heads, sum(calls), sum(calls), dtype=torch.bool)
        for group in layer.groups:
            seen[list(group.kv_heads)] = key_positions(group.policy, calls, real, rooms) >= 0
        out.append(seen)
    return out


# a model run on it ----------------------------------------------------------------------------------------------------


class _Wide(TorchFunctionMode):
    """Models compute norms and softmax in float32 whatever their dtype: here they ask for it and get `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func, args = torch.Tensor.to, (args[0], self.dtype)
        args = tuple(self.dtype if a is torch.float32 else a for a in args)
        kwargs = {k: self.dtype if a is torch.float32 else a for k, a in (kwargs or {}).items()}
        return func(*args, **kwargs)


@torch.no_grad()
def oracle_logits(
    model: PreTrainedModel,
    plan: Plan,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    *,
    calls: Sequence[int] | None = None,
    rooms: Mapping[int, int] | None = None,
) -> Tensor:
    """What a model says if its heads see exactly what a plan lets them see, at exactly those positions.

    The model's own modules do all but attention. They are told that every token stands at position 0, which leaves
    queries and keys as they were but for the factor of scaled rotary types; attention then rotates each visible key for
    each query, at frequencies as they are at short lengths.

    Args:
        model: an unpatched decoder with rotary positions; it is copied.
        plan: what each head does.
        input_ids: `[B, C]`.
        attention_mask: `[B, C]`, nonzero for real tokens; None: all are.
        dtype: of all computation.
        calls: columns of each call; None: one call. It matters to plans with a `prefill_window` and to `rooms`.
        rooms: as in `key_positions`.

    Returns:
        `[B, C, V]`, dtype as asked; of no meaning at padding.
    """
    if model.get_decoder().config._attn_implementation == "hf_longctx":  # type: ignore[no-untyped-call]
        raise ValueError("oracle_logits: expected an unpatched model; got a patched one. Pass a copy from before.")
    calls = [input_ids.shape[1]] if calls is None else calls
    rows: Any = [None] * input_ids.shape[0] if attention_mask is None else attention_mask
    policies = {group.policy for layer in plan.layers for group in layer.groups}
    places = [{policy: key_positions(policy, calls, real, rooms) for policy in policies} for real in rows]
    wide: Any = copy.deepcopy(model)
    wide.to(dtype)
    decoder = wide.get_decoder()
    decoder.config._attn_implementation_internal = _NAME
    decoder.config._experts_implementation_internal = "eager"  # other ways to mix experts do not take float64
    ALL_ATTENTION_FUNCTIONS[_NAME] = partial(_attend, decoder, plan, places)
    try:
        with _Wide(dtype):
            out = wide(input_ids=input_ids, position_ids=torch.zeros_like(input_ids), use_cache=False)
    finally:
        ALL_ATTENTION_FUNCTIONS.pop(_NAME)
    logits: Tensor = out.logits
    return logits


def _attend(
    decoder: Any,
    plan: Plan,
    places: Sequence[Mapping[HeadPolicy, Tensor]],
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
    """What transformers calls in each layer, q `[B, Hq, C, D]`, k and v `[B, Hkv, C, D]`: row by row, head by head."""
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    turn, per_kv = _rotation(decoder, module), q.shape[1] // k.shape[1]
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    for row, group in product(range(q.shape[0]), plan.layers[module.layer_idx].groups):
        for head in group.kv_heads:
            mine, at = slice(head * per_kv, (head + 1) * per_kv), places[row][group.policy]
            sinks = None if s_aux is None else s_aux[mine]
            read = _read(q[row, mine], k[row, head], v[row, head], at, turn, scale, softcap, sinks)
            out[row, :, mine] = read.transpose(0, 1)
    return out, None


def _rotation(decoder: Any, module: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """How a layer rotates `x` `[..., D]` to positions `[...]`."""
    kinds: Any = getattr(decoder.config, "layer_types", None)
    rotary = decoder.rotary_emb
    inv_freq = (
        rotary.inv_freq if hasattr(rotary, "inv_freq") else getattr(rotary, f"{kinds[module.layer_idx]}_inv_freq")
    )
    size, pairs = 2 * len(inv_freq), decoder.config.model_type in _INTERLEAVED

    def turn(x: Tensor, at: Tensor) -> Tensor:
        if not getattr(module, "use_rope", True):
            return x
        angle = at[..., None].to(x.dtype) * inv_freq.to(x.dtype)
        first, second = (slice(0, size, 2), slice(1, size, 2)) if pairs else (slice(size // 2), slice(size // 2, size))
        a, b = x[..., first], x[..., second]
        out = x.clone()
        out[..., first] = a * angle.cos() - b * angle.sin()
        out[..., second] = b * angle.cos() + a * angle.sin()
        return out

    return turn


def _read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    at: Tensor,
    turn: Callable[[Tensor, Tensor], Tensor],
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention of one KV head: q `[G, C, D]`, k `[C, D]`, v `[C, Dv]`, at `[C, C]`; gives `[G, C, Dv]`."""
    place = at.clamp(min=0)
    keys = turn(k.expand(len(at), -1, -1), place)  # a set of keys for every query: [C, C, D]
    x = torch.einsum("gtd,tsd->gts", turn(q, place.diagonal().expand(len(q), -1)), keys) * scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    x = x.masked_fill(at < 0, float("-inf"))
    if sinks is not None:
        x = torch.cat((x, sinks[:, None, None].to(x.dtype).expand(-1, len(at), 1)), -1)
    return x.softmax(-1).nan_to_num()[..., : len(at)] @ v


# makers ---------------------------------------------------------------------------------------------------------------


def tiny_llama(seed: int = 0, **facts: Any) -> LlamaForCausalLM:
    """A random Llama in float32 whose attention is far from uniform, so that a wrong position or mask shows.

    Args:
        seed: of the weights.
        **facts: for its `LlamaConfig`, in place of two layers, four query and two KV heads of eight channels.
    """
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
    }
    made = torch.Generator().manual_seed(seed)
    model: LlamaForCausalLM = LlamaForCausalLM(LlamaConfig(**{**sizes, **facts}))
    model.train(False)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=made)
            weight.copy_(noise * 1.5 / weight.shape[-1] ** 0.5 if weight.dim() > 1 else 1 + 0.2 * noise)
        embeddings: Any = model.get_input_embeddings()
        embeddings.weight.mul_(weight.shape[-1] ** 0.5)
    return model


@torch.no_grad()
def feed(
    model: PreTrainedModel,
    input_ids: Tensor,
    calls: Sequence[int],
    attention_mask: Tensor | None = None,
    rooms: Mapping[int, int] | None = None,
) -> tuple[Tensor, Any]:
    """Run a patched model call by call on one cache; arguments as `oracle_logits`. Gives `[B, C, V]` and the cache."""
    out, cache, start = [], None, 0
    for number, columns in enumerate(calls):
        if rooms and number in rooms:
            assert cache is not None
            cache.evict(rooms[number])
        seen = None if attention_mask is None else attention_mask[:, : start + columns]
        result: Any = model(
            input_ids[:, start : start + columns], attention_mask=seen, past_key_values=cache, use_cache=True
        )
        out.append(result.logits)
        cache, start = result.past_key_values, start + columns
    return torch.cat(out, 1), cache


def rounding(model: PreTrainedModel, keys: int, dtype: torch.dtype = torch.float32) -> float:
    """Relative error that `dtype` may add from tokens to logits: half an ulp for every term of every sum on the way.

    Args:
        model: the sums run over the inputs of its linear layers, its head channels and the visible keys.
        keys: most keys that a query sees.
        dtype: of the computation.
    """
    config: Any = model.config.get_text_config(decoder=True)
    linear = sum(m.weight.shape[-1] for m in model.modules() if isinstance(m, torch.nn.Linear))
    attention = config.num_hidden_layers * (keys + 2 * config.hidden_size // config.num_attention_heads)
    return float(torch.finfo(dtype).eps / 2 * (linear + attention))
