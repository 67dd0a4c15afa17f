"""A model whose heads do exactly what a plan says, in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..plan import HeadGroup, HeadPolicy, Plan
from .attend import attend
from .scene import Logits, Scene, Turn
from .storage import keys_read_back, read_back, stored_positions
from .visible import Span, key_positions, spans

_NAME = "hf_longctx_oracle"
_INTERLEAVED = ("cohere", "cohere2", "glm", "glm4")
"""Families that rotate channels (2i, 2i + 1) together, not (i, i + R/2)."""


class Widened(TorchFunctionMode):
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
    """What a model says if its heads read exactly what a plan lets them read, at exactly those positions.

    The model's own modules do all but attention. They are told that every token stands at position 0, which leaves
    queries and keys as they were but for the factor of scaled rotary types; attention then rotates each visible key for
    each query, at frequencies as they are at short lengths.

    Args:
        model: an unpatched decoder with rotary positions; it is copied.
        plan: what each head does.
        input_ids: `[B, C]`.
        attention_mask: `[B, C]`, nonzero for real tokens; None: all are.
        dtype: of all computation.
        calls: columns of each call; None: one call. It matters to plans with a `prefill_window` or a selector, and to
            `rooms`.
        rooms: as in `key_positions`.

    Returns:
        `[B, C, V]`, dtype as asked; of no meaning at padding.
    """
    with torch.no_grad():
        return _run(model, plan, input_ids, attention_mask, dtype, calls, rooms)[1]


def oracle_reads(
    model: PreTrainedModel,
    plan: Plan,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    *,
    calls: Sequence[int] | None = None,
    rooms: Mapping[int, int] | None = None,
) -> list[Tensor]:
    """Which keys each query of each query head reads: per layer `[B, Hq, C, C]`, bool; arguments as `oracle_logits`."""
    with torch.no_grad():
        return _run(model, plan, input_ids, attention_mask, dtype, calls, rooms)[2]


def oracle_gradients(
    model: PreTrainedModel,
    plan: Plan,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    """Gradient of the mean cross entropy of the next tokens, by parameter; arguments as `oracle_logits`.

    Args:
        model: its parameters that ask for no gradient get none.
        plan: what each head does.
        input_ids: `[B, C]`.
        labels: `[B, C]`, what stands there; -100 where it does not count.
        attention_mask: `[B, C]`.
        dtype: of all computation.
    """
    wide, logits, _ = _run(model, plan, input_ids, attention_mask, dtype, None, None)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: weight.grad for name, weight in wide.named_parameters() if weight.grad is not None}


def _run(
    model: PreTrainedModel,
    plan: Plan,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    dtype: torch.dtype,
    calls: Sequence[int] | None,
    rooms: Mapping[int, int] | None,
) -> tuple[PreTrainedModel, Tensor, list[Tensor]]:
    """The copy that ran, logits, and per layer what was read."""
    if model.get_decoder().config._attn_implementation == "hf_longctx":  # type: ignore[no-untyped-call]
        raise ValueError("oracle: expected an unpatched model; got a patched one. Pass a copy from before.")
    calls = [input_ids.shape[1]] if calls is None else calls
    reals: Any = [None] * len(input_ids) if attention_mask is None else attention_mask
    policies = {group.policy for layer in plan.layers for group in layer.groups}
    rows = [_Row.of(policies, calls, real, rooms) for real in reals]
    wide: Any = copy.deepcopy(model)
    wide.to(dtype).zero_grad()
    decoder = wide.get_decoder()
    decoder.config._attn_implementation_internal = _NAME
    decoder.config._experts_implementation_internal = "eager"  # other ways to mix experts do not take float64
    reads: dict[int, Tensor] = {}
    ALL_ATTENTION_FUNCTIONS[_NAME] = partial(_attend, decoder, plan, rows, reads)
    try:
        with Widened(dtype):
            out = wide(input_ids=input_ids, position_ids=torch.zeros_like(input_ids), use_cache=False)
    finally:
        ALL_ATTENTION_FUNCTIONS.pop(_NAME)
    return wide, out.logits, [reads[layer] for layer in range(len(plan.layers))]


@dataclass(frozen=True)
class _Row:
    """A row's tokens: their columns, the calls they come in, and where each policy reads them, `[n, n]`."""

    columns: Tensor
    spans: Sequence[Span]
    places: Mapping[HeadPolicy, Tensor]

    @staticmethod
    def of(
        policies: set[HeadPolicy], calls: Sequence[int], real: Tensor | None, rooms: Mapping[int, int] | None
    ) -> _Row:
        columns = torch.arange(sum(calls)) if real is None else real.nonzero()[:, 0]
        places = {p: key_positions(p, calls, real, rooms)[columns[:, None], columns] for p in policies}
        return _Row(columns, spans(calls, real), places)


def _attend(
    decoder: Any,
    plan: Plan,
    rows: Sequence[_Row],
    reads: dict[int, Tensor],
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
    turn, per_kv, layer = _rotation(decoder, module), q.shape[1] // k.shape[1], module.layer_idx
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])
    read = torch.zeros(*q.shape[:3], q.shape[2], dtype=torch.bool)
    for (i, row), group in product(enumerate(rows), plan.layers[layer].groups):
        kv_heads = torch.tensor(group.kv_heads)
        q_heads = (kv_heads[:, None] * per_kv + torch.arange(per_kv)).flatten()
        logits = Logits(scale, softcap, None if s_aux is None else s_aux[q_heads])
        if plan.zero_sink:
            logits = Logits(scale, softcap, q.new_zeros(len(q_heads)))
        parts = [x[i, heads][:, row.columns] for x, heads in ((q, q_heads), (k, kv_heads), (v, kv_heads))]
        got, seen = attend(_scene(plan, group, row, turn, logits, *parts), group.policy)
        out[i, row.columns[:, None], q_heads] = got.transpose(0, 1)
        read[i, q_heads[:, None, None], row.columns[:, None], row.columns] = seen
    reads[layer] = read
    return out, None


def _scene(
    plan: Plan, group: HeadGroup, row: _Row, turn: Turn, logits: Logits, q: Tensor, k: Tensor, v: Tensor
) -> Scene:
    """Tokens of one row as a group of heads has them, its keys and values read back from where they are stored."""
    policy = group.policy
    if policy.kv is not None:
        if policy.kv.recent:
            raise ValueError("oracle: expected keys and values read in one format; got recent ones. Use recent=0.")
        at = stored_positions(k.shape[1], plan.sink, plan.lap)
        k, v = keys_read_back(k, policy.kv.bits, at, turn), read_back(v, policy.kv.bits)
    return Scene(q, k, v, row.places[policy], row.spans, policy.positions.distance, turn, logits)


def _rotation(decoder: Any, module: Any) -> Turn:
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
