"""One line in, one line out: hooks, the cache that is handed out, and the way back. No mathematics here."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from . import adapters, attention
from .attention import NAME, PATCHED, STOCK, Forward, Rotary
from .cache.cache import Ledger, LongContextCache
from .cache.step import Step
from .errors import UnsupportedError
from .kernels import ops
from .memory import check_room
from .methods import Method, make
from .models import ADAPTED, ModelFacts, attention_modules, decoder_of, inspect_model
from .plan import Plan

M = TypeVar("M", bound=PreTrainedModel)
_KEY = "_hf_longctx"


@dataclass(eq=False)
class Patch:
    """What `patch` did to one model, and what it knows since.

    Attributes:
        facts: of the model.
        plan: in force.
        stock: attention implementation that the model had.
        rotary: how each layer rotates, when the plan needs it.
        ledger: of the last cache handed out.
    """

    facts: ModelFacts
    decoder: PreTrainedModel
    stock: str
    plan: Plan
    rotary: tuple[Rotary, ...] = ()
    ledger: Ledger = field(default_factory=Ledger)
    hooks: list[Any] = field(default_factory=list)
    cache: ReferenceType[LongContextCache] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": None}


def state_of(model: nn.Module) -> Patch | None:
    """The patch in force on a model, or None."""
    _, base = decoder_of(model)  # type: ignore[arg-type]
    state: Patch | None = base.__dict__.get(_KEY)
    return state


def patch(model: M, method: str | Method | Plan, **knobs: Any) -> M:
    """Run a loaded model with another way to hold and read its KV cache.

    `generate()`, pipelines and plain forward calls work as before; `unpatch` gives back the very same model. Patching a
    patched model replaces the plan at once; a cache of the former plan is refused from then on.

    Args:
        model: a decoder from transformers, alone or inside PEFT; it is changed in place.
        method: `"dense"`, `"streaming_llm"`, `"duo_attention"`, a method such as `StreamingLLM(sinks=4)`, or a `Plan`.
        **knobs: the method's knobs, if it is given by name.

    Returns:
        The same object.

    Raises:
        ValueError: unknown method or knob, or a value that does not fit; nothing was changed.
        UnsupportedError: this model cannot do that, and why; nothing was changed.
    """
    made = make(method, knobs)
    decoder, base = decoder_of(model)
    facts = inspect_model(model)
    plan = made if isinstance(made, Plan) else made.plan(facts)
    check_plan(plan, facts)
    state: Patch | None = base.__dict__.get(_KEY)
    if state is not None:
        state.rotary = state.rotary or (_probe(state) if plan.in_cache else ())
        state.plan, state.cache, state.ledger = plan, None, Ledger()
        return model
    state = Patch(facts, decoder, _stock(decoder.config), plan)
    try:
        _install(state)
        state.rotary = _probe(state) if plan.in_cache else ()
    except BaseException:
        _remove(state)
        raise
    base.__dict__[_KEY] = state
    return model


def unpatch(model: M) -> M:
    """Take every hook off again; the model computes bit for bit what it did before. No-op if it is not patched."""
    _, base = decoder_of(model)
    state: Patch | None = base.__dict__.pop(_KEY, None)
    if state is not None:
        _remove(state)
    return model


@contextmanager
def patched(model: M, method: str | Method | Plan, **knobs: Any) -> Iterator[M]:
    """`patch` inside a block; afterwards the model is as it was, with its former plan if it had one."""
    state = state_of(model)
    before = None if state is None else state.plan
    patch(model, method, **knobs)
    try:
        yield model
    finally:
        if before is None:
            unpatch(model)
        else:
            patch(model, before)


def evict(target: PreTrainedModel | LongContextCache, room: int) -> None:
    """Make room in a streaming cache before a chat turn, so that the turn's tokens push nothing out.

    Args:
        target: a cache, or a patched model (then the cache that it handed out last).
        room: tokens that are to come.

    Raises:
        ValueError: the model has no live cache, the plan keeps everything, or room is larger than the window.
    """
    if not isinstance(target, LongContextCache):
        state = state_of(target)
        cache = None if state is None or state.cache is None else state.cache()
        if cache is None:
            raise ValueError(
                "evict: expected a patched model with a live cache; got none. Keep outputs.past_key_values of a call, "
                "and pass that cache."
            )
        target = cache
    target.evict(room)


def check_plan(plan: Plan, facts: ModelFacts) -> None:
    """Raise ValueError unless the plan is for a model of these layers and KV heads."""
    expected = [layer.kv_heads for layer in facts.layers]
    got = [layer.kv_heads for layer in plan.layers]
    if expected != got:
        where = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), None)
        raise ValueError(
            f"patch: expected a plan for {len(expected)} layers"
            + ("" if where is None else f" with {expected[where]} KV heads in layer {where}")
            + f"; got plan '{plan.method}' with {len(got)} layers"
            + ("" if where is None else f" and {got[where]} KV heads there")
            + ". Make the plan for this model."
        )


# installing -----------------------------------------------------------------------------------------------------


def _stock(config: Any) -> str:
    """The attention implementation of a configuration before any patch of ours."""
    known = next((name for other, name in STOCK if other is config), None)
    return known or config._attn_implementation


def _install(state: Patch) -> None:
    AttentionInterface.register(NAME, attention.attention)
    AttentionMaskInterface.register(NAME, attention.mask)
    STOCK.append((state.decoder.config, state.stock))
    state.decoder.config._attn_implementation_internal = NAME
    state.hooks = [
        state.decoder.register_forward_pre_hook(BeforeForward(state), with_kwargs=True),
        state.decoder.register_forward_hook(AfterForward(state), always_call=True),
    ]
    for module in attention_modules(state.decoder):
        PATCHED.add(module)
        if state.facts.family in ADAPTED:
            adapters.install(module, state.facts.family)


def _remove(state: Patch) -> None:
    for hook in state.hooks:
        hook.remove()
    for module in attention_modules(state.decoder):
        PATCHED.discard(module)
        if state.facts.family in ADAPTED:
            adapters.remove(module)
    config = state.decoder.config
    mine = next((i for i, (other, _) in enumerate(STOCK) if other is config), None)
    if mine is not None:
        del STOCK[mine]
    if not any(other is config for other, _ in STOCK):
        config._attn_implementation_internal = state.stock


def _probe(state: Patch) -> tuple[Rotary, ...]:
    """How each layer rotates, seen on one tiny call: the same tokens at two places, with attention that gives zeros.

    Raises:
        UnsupportedError: a layer's queries move with the position in a way that is not a known rotation.
    """
    decoder, shift = state.decoder, 7
    device = decoder.get_input_embeddings().weight.device
    pos = torch.arange(3, device=device)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    step = Step.of(0, 3, device, None, None)
    forward = Forward(state.facts, state.plan, step, None, probe=found)
    arguments = {"position_ids": torch.stack((pos, pos + shift))} if _takes_positions(decoder) else {}
    training = decoder.training
    decoder.eval()
    try:
        with torch.no_grad():
            decoder(input_ids=torch.zeros(2, 3, dtype=torch.int64, device=device), hf_longctx=forward, use_cache=False, **arguments)
    finally:
        decoder.train(training)
    candidates = [b for name, b in decoder.named_buffers() if name.endswith("inv_freq") and b is not None]
    return tuple(_rotary(state, layer, *found[layer], candidates, shift) for layer in range(len(state.facts.layers)))


def _rotary(state: Patch, layer: int, q: Tensor, k: Tensor, candidates: list[Tensor], shift: int) -> Rotary:
    """The rotation that carries row 0 of q and k `[2, H, T, D]` to row 1."""
    delta = torch.full((1, q.shape[2]), shift, device=q.device)
    tolerance = 1e-3 if q.dtype in (torch.float32, torch.float64) else 3e-2

    def error(rotary: Rotary) -> float:
        worst = 0.0
        for x in (q, k):
            here, there = x[:1].float(), x[1:].float()
            if rotary.inv_freq is not None:
                here = ops.rotate(here, delta, rotary.inv_freq.to(x.device), rotary.interleaved)
            worst = max(worst, float((here - there).abs().max() / there.abs().max().clamp(min=1e-9)))
        return worst

    known = [Rotary(None)] + [Rotary(f.float().clone(), i) for f in candidates for i in (False, True)]
    best = min(known, key=error)
    if error(best) > tolerance:
        raise UnsupportedError(
            f"streaming: expected layer {layer} of '{state.facts.family}' to rotate queries and keys in halves or in "
            f"pairs by its inv_freq; got something else (relative error {error(best):.1e}). Use a method with positions "
            "of the text, such as 'duo_attention'."
        )
    return best


def _takes_positions(decoder: nn.Module) -> bool:
    return "position_ids" in inspect.signature(decoder.forward).parameters


# every call -----------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class BeforeForward:
    """Pre-hook of the decoder: hands out the cache, and the call's context to the layers."""

    state: Patch

    def __call__(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Bind the arguments by name, and put ours among them."""
        state = self.state
        if decoder.config._attn_implementation != NAME:
            raise RuntimeError(
                f"hf_longctx: expected attn_implementation='{NAME}' on a patched model; got "
                f"'{decoder.config._attn_implementation}'. Call hf_longctx.unpatch(model) before you choose another."
            )
        if args:
            names = list(inspect.signature(decoder.forward).parameters)
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if kwargs.get("hf_longctx") is not None:  # a probe brings its own
            attention.enter(kwargs["hf_longctx"])
            return (), kwargs
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        mask = _padding(state, kwargs)
        cache = _cache(state, decoder, kwargs)
        rows, columns = tokens.shape[:2]
        if cache is None:
            step = Step.of(0, columns, tokens.device, None, mask)
        else:
            check_room(state.facts, state.plan, cache, rows, columns, decoder.dtype, tokens.device)
            step = cache.begin(columns, rows, tokens.device, mask)
            kwargs["past_key_values"] = cache
        forward = Forward(state.facts, state.plan, step, cache, state.rotary)
        _place(state, decoder, kwargs, forward, rows, columns)
        kwargs["hf_longctx"] = forward
        attention.enter(forward)
        return (), kwargs


@dataclass(eq=False)
class AfterForward:
    """Hook of the decoder, called even if it fails: counts the call's tokens if it ran to its end."""

    state: Patch

    def __call__(self, decoder: Any, args: tuple[Any, ...], output: Any) -> None:
        """Commit the step."""
        forward = attention.current()
        attention.enter(None)
        if forward is not None and forward.cache is not None and output is not None:
            forward.cache.commit(forward.step)


def _padding(state: Patch, kwargs: dict[str, Any]) -> Tensor | None:
    """The 2-D padding mask of a call, or None; everything else is refused by name."""
    mask = kwargs.get("attention_mask")
    if kwargs.get("output_attentions") or getattr(state.decoder.config, "output_attentions", False):
        raise UnsupportedError(
            "hf_longctx: expected output_attentions=False, because attention weights are never formed; got True. "
            "Unpatch the model to look at them."
        )
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    shown = f"{mask.ndim}-D" if isinstance(mask, Tensor) else type(mask).__name__
    raise UnsupportedError(
        f"hf_longctx: expected attention_mask as [B, T] (1 for real tokens) or None; got a {shown} mask. "
        "Unpatch the model for masks of another form."
    )


def _cache(state: Patch, decoder: Any, kwargs: dict[str, Any]) -> LongContextCache | None:
    """The call's cache: the one that was passed, a new one in place of an empty stock cache, or None."""
    cache = kwargs.get("past_key_values")
    if isinstance(cache, LongContextCache):
        if cache.plan != state.plan:
            raise TypeError(
                f"hf_longctx: expected a cache of plan '{state.plan.method}', which is in force; got one made for plan "
                f"'{cache.plan.method}'. Start a new cache after patching."
            )
        state.ledger, state.cache = cache.ledger, ref(cache)
        return cache
    if cache is not None and (type(cache) is not DynamicCache or cache.get_seq_length() > 0):
        filled = isinstance(cache, Cache) and bool(cache.get_seq_length() > 0)
        raise TypeError(
            f"hf_longctx: expected no cache, an empty DynamicCache or a LongContextCache; got a "
            f"{'filled ' if filled else ''}{type(cache).__name__}. Leave out past_key_values and cache_implementation: "
            "a patched model makes its own cache."
        )
    use = kwargs.get("use_cache")
    use = decoder.config.use_cache if use is None else use
    if cache is None and (not use or (decoder.training and getattr(decoder, "gradient_checkpointing", False))):
        return None
    fresh = LongContextCache(state.plan)
    if cache is not None and any(getattr(layer, "record_past", False) for layer in cache.layers):
        fresh.activate_past_recording()
    state.ledger, state.cache = fresh.ledger, ref(fresh)
    return fresh


def _place(
    state: Patch, decoder: Any, kwargs: dict[str, Any], forward: Forward, rows: int, columns: int
) -> None:
    """Give the model the positions at which it shall rotate, where the plan counts them in the cache."""
    given = kwargs.get("position_ids")
    if forward.cache is None and isinstance(given, Tensor) and given.ndim == 2 and columns > 1:
        step = given[:, 1:] - given[:, :-1]
        if kwargs.get("attention_mask") is None and bool((step != 1).any()):
            raise UnsupportedError(
                "hf_longctx: expected position_ids that count up by one; got packed sequences. Pass one text per row."
            )
    if not state.plan.in_cache or not _takes_positions(decoder):
        return
    if isinstance(given, Tensor) and given.ndim == 3 and bool((given[-3:] != given[-3:-2]).any()):
        raise UnsupportedError(
            f"{state.plan.method}: expected text, whose position is one number; got position_ids {list(given.shape)} of "
            "images or video. Unpatch the model for them."
        )
    pos = attention.text_positions(forward).expand(rows, -1)
    kwargs["position_ids"] = pos if not isinstance(given, Tensor) or given.ndim == 2 else pos.expand_as(given)
    if forward.cache is None and kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = torch.ones(rows, columns, dtype=torch.bool, device=pos.device)
