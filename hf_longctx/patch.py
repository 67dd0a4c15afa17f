"""One line in, one line out: hooks, the cache that is handed out, and the way back. No mathematics here."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from . import adapters, integers, shortcuts, turning
from .ahead import METHODS, Noted
from .attention import register
from .cache.cache import LongContextCache
from .cache.ledger import Ledger
from .context import NAME
from .graph import Recorder
from .hooks import AfterForward, BeforeForward, NoBatching, Patch, PrepareCache, PrepareSettings
from .methods import Auto, DuoHeads, Method, check_plan, check_trainable, compose, make, own_facts, own_plan
from .models import ADAPTED, NO_CACHE_BY_DEFAULT, ModelFacts, attention_modules, decoder_of, inspect_model
from .plan import KVFormat, Placement, Plan
from .prompt import Prefill

M = TypeVar("M", bound=PreTrainedModel)
_KEY = "_hf_longctx"
_PREPARE = "_prepare_cache_for_generation"
_SETTLE = "_prepare_generation_config"
_PREFILL = "_prefill"
_BATCHING = "init_continuous_batching"


def state_of(model: nn.Module) -> Patch | None:
    """The patch in force on a model, or None."""
    _, base = decoder_of(model)  # type: ignore[arg-type]
    state: Patch | None = base.__dict__.get(_KEY)
    return state


def patch(
    model: M,
    method: str | Method | Plan | None = None,
    *,
    prefill: Method | None = None,
    decode: Method | None = None,
    heads: DuoHeads | None = None,
    kv: str | KVFormat | None = None,
    placement: Placement | None = None,
    cuda_graph: bool = True,
    zero_sink: bool = False,
    train: bool = False,
    **knobs: Any,
) -> M:
    """Run a loaded model with another way to hold and read its KV cache.

    `generate()`, pipelines and plain forward calls work as before; `unpatch` gives back the very same model. Patching a
    patched model replaces the plan at once; a cache of the former plan is refused from then on.

    Args:
        model: a decoder from transformers, alone or inside PEFT; it is changed in place.
        method: the name of a method (`METHODS` has them all), a method such as `StreamingLLM(sinks=4)`, or a `Plan`;
            left out: what the values below say, or `"auto"`, if they say nothing.
        prefill: by whose choice prompts are read, in place of the method's.
        decode: by whose choice decode steps are read, in place of the method's.
        heads: which heads stream, whatever the methods choose.
        kv: how keys and values are stored: `"native"`, `"int8"` or `"int4"`; None: as the method
            says, or, where that is native, as a quantized checkpoint does (`QoQConfig(kv_bits=4)`).
        placement: where blocks are stored that a step may leave out; None: as the method says.
        cuda_graph: on a GPU, record the step of one token as a CUDA graph and replay it; `report` says if it could not.
        zero_sink: add 1 to the denominator of every softmax, so that a head may attend to nothing (StreamingLLM,
            arXiv:2309.17453, §3.3): for a model that is trained so, and patched so ever after.
        train: refuse what has no gradient; a call in training mode then gets no cache. Prompts are read as the plan
            says, with the exact gradient of that attention; packed texts (`position_ids` that start again) apart.
        **knobs: the method's knobs, if it is given by name.

    Returns:
        The same object.

    Raises:
        ValueError: unknown method or knob, or a value that does not fit; nothing was changed.
        UnsupportedError: this model cannot do that, and why; nothing was changed.
    """
    made = None if method is None and not knobs else make("auto" if method is None else method, knobs)
    decoder, base = decoder_of(model)
    facts = inspect_model(model)
    if kv is None and not train:
        made, kv = _as_quantized(base, made, all(value is None for value in (prefill, decode, heads, placement)))
    plan = plan_for(facts, made, prefill, decode, heads, kv, placement)
    plan = replace(plan, zero_sink=plan.zero_sink or zero_sink)
    check_plan(plan, facts)
    if train:
        check_trainable(plan)
    own = own_plan(plan, facts)
    state: Patch | None = base.__dict__.get(_KEY)
    if state is not None:
        turning.install(decoder, plan.at_read)
        state.find_rotary(plan)
        shortcuts.install(decoder)  # the model may have come to a GPU
        integers.install(decoder)
        state.whole, state.plan, state.train, state.cache, state.ledger = plan, own, train, None, Ledger()
        state.recorder.renew(cuda_graph)
        return model
    recorder = Recorder(decoder, cuda_graph)
    state = Patch(own_facts(facts), decoder, decoder.config, plan, own, recorder, train)
    try:
        _install(state)
        turning.install(decoder, plan.at_read)
        state.find_rotary(plan)
    except BaseException:
        _remove(state)
        raise
    base.__dict__[_KEY] = state
    if hasattr(base, _PREPARE):
        base.__dict__[_PREPARE] = PrepareCache(base, state)
        base.__dict__[_PREFILL] = Prefill(base, state)
        base.__dict__[_BATCHING] = NoBatching(base)
        base.__dict__.update({name: Noted(base, name) for name in METHODS})
        if facts.family in NO_CACHE_BY_DEFAULT:
            base.__dict__[_SETTLE] = PrepareSettings(base)
    return model


def _as_quantized(
    base: PreTrainedModel, made: Method | Plan | None, alone: bool
) -> tuple[Method | Plan | None, str | None]:
    """The method and `kv` of a model whose checkpoint says how many bits keys and values should have (`kv_bits`).

    A plan, and a method that has bits of its own, stay as they are.
    """
    bits = getattr(getattr(base.config, "quantization_config", None), "kv_bits", None)
    if bits is None or isinstance(made, Plan):
        return made, None
    stored = f"int{bits}"
    if made is None:
        return (Auto(kv=stored), None) if alone else (None, stored)
    own: Any = made
    return (replace(own, kv=stored), None) if own.kv == "native" else (made, None)


def plan_for(
    facts: ModelFacts,
    method: Method | Plan | None = None,
    prefill: Method | None = None,
    decode: Method | None = None,
    heads: DuoHeads | None = None,
    kv: str | KVFormat | None = None,
    placement: Placement | None = None,
) -> Plan:
    """The plan that `patch` puts in force for these arguments."""
    axes = (prefill, decode, heads, kv, placement)
    if method is None and all(value is None for value in axes):
        method = Auto()
    if method is not None and all(value is None for value in axes):
        return method if isinstance(method, Plan) else method.plan(facts)
    return compose(facts, prefill or method, decode or method, heads, kv, placement)


def unpatch(model: M) -> M:
    """Take every hook off again; the model computes bit for bit what it did before. No-op if it is not patched."""
    _, base = decoder_of(model)
    state: Patch | None = base.__dict__.pop(_KEY, None)
    if state is not None:
        for name in (_PREPARE, _SETTLE, _PREFILL, _BATCHING, *METHODS):
            base.__dict__.pop(name, None)
        _remove(state)
    return model


@contextmanager
def patched(model: M, method: str | Method | Plan | None = None, **knobs: Any) -> Iterator[M]:
    """`patch` inside a block, with its arguments; afterwards the model is as it was, its former plan in force."""
    state = state_of(model)
    before = None if state is None else (state.whole, state.recorder.on, state.train)
    patch(model, method, **knobs)
    try:
        yield model
    finally:
        if before is None:
            unpatch(model)
        else:
            plan, recorded, train = before
            patch(model, plan, cuda_graph=recorded, train=train)


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


# installing -----------------------------------------------------------------------------------------------------


def _install(state: Patch) -> None:
    """Hook the decoder, and let it and its attention see a copy of the configuration that names our function.

    The configuration itself may belong to other models too, and stays as it is.
    """
    register()
    own = copy.copy(state.stock)
    state.settings = dict(vars(own))
    own._attn_implementation_internal = NAME
    _share(state, state.stock, own)
    state.hooks = [
        state.decoder.register_forward_pre_hook(BeforeForward(state), with_kwargs=True),
        state.decoder.register_forward_hook(AfterForward(state), always_call=True),
    ]
    state.decoder.__dict__.setdefault("forward", state.recorder)
    if state.facts.family in ADAPTED:
        for module in attention_modules(state.decoder):
            adapters.install(module, state.facts.family)
    shortcuts.install(state.decoder)
    integers.install(state.decoder)


def _remove(state: Patch) -> None:
    for hook in state.hooks:
        hook.remove()
    shortcuts.remove(state.decoder)
    turning.install(state.decoder, False)
    if state.decoder.__dict__.get("forward") is state.recorder:
        del state.decoder.__dict__["forward"]
    if state.facts.family in ADAPTED:
        for module in attention_modules(state.decoder):
            adapters.remove(module)
    own: Any = state.decoder.config
    if own is not state.stock:  # what the user set meanwhile stays set
        state.follow()
        if own._attn_implementation_internal != NAME:
            state.stock._attn_implementation_internal = own._attn_implementation_internal
        _share(state, own, state.stock)


def _share(state: Patch, old: Any, new: Any) -> None:
    """Give the decoder and its attention modules another configuration object."""
    for module in (state.decoder, *attention_modules(state.decoder)):
        if module.__dict__.get("config") is old:
            module.__dict__["config"] = new
