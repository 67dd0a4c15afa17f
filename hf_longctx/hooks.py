"""What happens at every call of a patched decoder: a cache is handed out, and the call's context to the layers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, ref

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from .attention import register
from .cache.cache import LongContextCache
from .cache.ledger import Ledger
from .cache.step import Step, check_cached
from .context import NAME, Forward, Rotary, current, enter
from .errors import UnsupportedError
from .graph import Recorder
from .kernels.between import between_graphs
from .masks import find_padding
from .memory import check_room
from .models import CACHE, ModelFacts
from .places import find_texts, place
from .plan import Plan
from .rotary import find_rotary


@dataclass(eq=False)
class Patch:
    """What `patch` did to one model, and what it knows since.

    Attributes:
        facts: of the model, of the heads that this process has.
        whole: the plan as it was given.
        plan: in force: for these heads.
        stock: the decoder's own configuration.
        settings: what both configurations said when they were last compared.
        rotary: how each layer rotates, when the plan needs it.
        rotary_dtype: the model's type when that was found; to cast a model rounds its frequencies.
        ledger: of the last cache handed out.
        train: the plan has a gradient; calls in training mode get no cache.
        recorder: of calls of one token; stands in place of the decoder's `forward`.
        watch: told of every choice of blocks, as `Forward.watch`.
        tap: told of what each group of heads read, as `Forward.tap`.
    """

    facts: ModelFacts
    decoder: PreTrainedModel
    stock: Any
    whole: Plan
    plan: Plan
    recorder: Recorder
    train: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    rotary: tuple[Rotary, ...] = ()
    rotary_dtype: torch.dtype | None = None
    ledger: Ledger = field(default_factory=Ledger)
    hooks: list[Any] = field(default_factory=list)
    cache: ReferenceType[LongContextCache] | None = None
    watch: Any = None
    tap: Any = None

    def follow(self) -> None:
        """Carry over what the user has set on one of the two configurations, all but the attention implementation."""
        own, stock, known = vars(self.decoder.config), vars(self.stock), self.settings
        for name in {**stock, **own}:
            if name == "_attn_implementation_internal":
                continue
            if own.get(name) is not known.get(name):
                known[name] = stock[name] = own.get(name)
            elif stock.get(name) is not known.get(name):
                known[name] = own[name] = stock.get(name)

    def find_rotary(self, plan: Plan) -> None:
        """Look how the model rotates, unless the plan needs no knowledge of it or it is known."""
        if plan.bounded and self.rotary_dtype != self.decoder.dtype:
            self.rotary = find_rotary(self.decoder, self.facts, plan)
            self.rotary_dtype = self.decoder.dtype

    def fresh_cache(self) -> LongContextCache:
        """A new cache for the plan in force; the report speaks of it from now on."""
        cache = LongContextCache(self.plan)
        self.ledger, self.cache = cache.ledger, ref(cache)
        return cache

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": None, "watch": None, "tap": None}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        register()  # a pickle may be read where nothing was patched yet


@dataclass(eq=False)
class PrepareCache:
    """In place of the model's `_prepare_cache_for_generation`: `generate()` starts with our cache.

    The pre-hook below would hand one out as well, but later than assisted decoding asks its cache to record.
    """

    model: PreTrainedModel
    state: Patch

    def __call__(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Let the model prepare what it would, then replace a new stock cache."""
        given, mask = model_kwargs.get(CACHE), model_kwargs.get("attention_mask")
        if isinstance(given, LongContextCache) and mask is not None and mask.shape[1] > given.ledger.columns:
            check_cached(mask.bool(), given.ledger.columns, given.ledger.lengths)  # calls of one token do not look
        stock: Any = type(self.model)
        stock._prepare_cache_for_generation(self.model, generation_config, model_kwargs, *args, **kwargs)
        if given is None and _replaceable(model_kwargs.get(CACHE)):
            cache = model_kwargs[CACHE] = self.state.fresh_cache()
            if getattr(generation_config, "is_assistant", False):
                cache.activate_past_recording()  # type: ignore[no-untyped-call]


@dataclass(eq=False)
class PrepareSettings:
    """In place of `_prepare_generation_config` where a family has no cache by default: `generate()` uses one.

    Without, every step would encode the whole text again. `use_cache=False` as an argument of the call holds, alone or
    in a `GenerationConfig` of its own; one that was made from the model's configuration only repeats its default.
    """

    model: PreTrainedModel

    def __call__(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Let the model settle what it would, then turn the cache on unless the call asked for none."""
        stock: Any = type(self.model)
        settled = stock._prepare_generation_config(self.model, generation_config, *args, **kwargs)
        asked = kwargs.get("use_cache")
        if asked is None and not getattr(generation_config, "_from_model_config", False):
            asked = getattr(generation_config, "use_cache", None)
        if asked is None:
            settled[0].use_cache = True
        return settled


@dataclass(eq=False)
class NoBatching:
    """In place of `init_continuous_batching`, whose own paged cache would only fail in another thread."""

    model: PreTrainedModel

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "hf_longctx: expected generate(), forward or a pipeline; got continuous batching (generate_batch), which "
            "has a paged cache of its own. Unpatch the model, or serve it with vLLM."
        )


@dataclass(eq=False)
class BeforeForward:
    """Pre-hook of the decoder: hands out the cache, and the call's context to the layers."""

    state: Patch

    def __call__(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Bind the arguments by name, and put ours among them."""
        if torch.compiler.is_compiling():
            begun: tuple[Any, dict[str, Any]] = _outside(self.begin, decoder, args, kwargs, True)
            return begun
        return self.begin(decoder, args, kwargs, False)

    def begin(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], graphed: bool
    ) -> tuple[Any, dict[str, Any]]:
        """The same; graphed: a compiler has made graphs of what follows, which know nothing of this call."""
        state = self.state
        if decoder.config._attn_implementation != NAME:
            raise RuntimeError(
                f"hf_longctx: expected attn_implementation='{NAME}' on a patched model; got "
                f"'{decoder.config._attn_implementation}'. Call hf_longctx.unpatch(model) before you choose another."
            )
        if args:
            names = list(inspect.signature(decoder.forward).parameters)
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        if CACHE != "past_key_values" and "past_key_values" in kwargs:  # its name before
            kwargs = {**kwargs, CACHE: kwargs["past_key_values"]}
            del kwargs["past_key_values"]
        if kwargs.get("hf_longctx") is not None:  # a probe brings its own
            enter(kwargs["hf_longctx"])
            return (), kwargs
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs.get("inputs_embeds")
        if tokens is None:
            return (), kwargs  # the model says it best
        _check_looked_at(state)
        state.follow()
        state.find_rotary(state.whole)  # in all processes or in none
        mask = find_padding(decoder, kwargs, tokens.shape[1])
        if state.train and decoder.training and kwargs.get(CACHE) is None:
            kwargs["use_cache"] = False  # nothing reads it again
        cache = _cache(state, decoder, kwargs)
        rows, columns = tokens.shape[:2]
        texts = find_texts(state.plan, kwargs, cache is not None, rows, columns, state.train)
        recorded = False
        if cache is None:
            step = Step.of(0, columns, tokens.device, None, mask)
        else:
            if cache.ledger.columns and decoder.training and torch.is_grad_enabled():
                raise UnsupportedError(
                    "hf_longctx: expected to train on whole texts; got a call that goes on from a filled cache, whose "
                    "keys and values carry no gradient. Pass the text in one call, or call model.eval()."
                )
            check_room(state.facts, state.plan, cache, rows, columns, decoder.dtype, tokens.device)
            watched = (state.watch or state.tap) is not None
            recorded = state.recorder.takes(state.plan, cache, kwargs, tokens, watched, graphed)
            step = cache.begin(columns, rows, tokens.device, mask, look=not recorded)
            kwargs[CACHE] = cache
        forward = Forward(state.facts, state.plan, step, cache, state.rotary, None, state.watch, state.tap, recorded)
        place(forward, decoder, kwargs, rows, texts)
        if not graphed:
            kwargs["hf_longctx"] = forward
        enter(forward, hold=graphed)
        return (), kwargs


@dataclass(eq=False)
class AfterForward:
    """Hook of the decoder, called even if it fails: counts the call's tokens if it ran to its end."""

    state: Patch

    def __call__(self, decoder: Any, args: tuple[Any, ...], output: Any) -> None:
        """Commit the step."""
        if torch.compiler.is_compiling():
            _outside(self.commit, output)
        else:
            self.commit(output)

    def commit(self, output: Any) -> None:
        """The same, of the current call."""
        forward = current()
        enter(None)
        if forward is not None and forward.cache is not None and output is not None:
            forward.count()
            forward.cache.commit(forward.step, looked=not forward.recorded)


@between_graphs("what a call finds in its cache, and where its tokens go there, is no graph")
def _outside(run: Any, *arguments: Any) -> Any:
    return run(*arguments)


def _check_looked_at(state: Patch) -> None:
    """Refuse to look at heads, or to ablate them, where not all is there as the model makes it."""
    if (state.tap or state.watch) is not None and state.facts.ranks > 1:
        raise UnsupportedError(
            f"hf_longctx: expected a whole model while heads are looked at, ablated or traced; got one over "
            f"{state.facts.ranks} processes. Load it without tensor parallelism."
        )
    if state.tap is not None and (state.plan.looks or state.plan.bounded):
        raise UnsupportedError(
            "hf_longctx: expected a plan that reads all keys as the model makes them, while heads are looked at or "
            f"ablated; got '{state.plan.method}'. Patch with 'dense'."
        )


def _cache(state: Patch, decoder: Any, kwargs: dict[str, Any]) -> LongContextCache | None:
    """The call's cache: the one that was passed, a new one in place of an empty stock cache, or None."""
    cache = kwargs.get(CACHE)
    if isinstance(cache, LongContextCache):
        if cache.plan != state.plan:
            raise TypeError(
                f"hf_longctx: expected a cache of plan '{state.plan.method}', which is in force; got one made for plan "
                f"'{cache.plan.method}'. Start a new cache after patching."
            )
        state.ledger, state.cache = cache.ledger, ref(cache)
        return cache
    if cache is not None and not _replaceable(cache):
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
    before = None if state.cache is None else state.cache()
    fresh = state.fresh_cache()
    if before is not None and before.stacks[0].recording:  # Phi-3 drops the prepared cache where its frequencies change
        fresh.activate_past_recording()  # type: ignore[no-untyped-call]
    return fresh


def _replaceable(cache: Any) -> bool:
    """True for a stock cache that nobody has filled and that asks for nothing special."""
    return type(cache) is DynamicCache and not cache.offloading and cache.get_seq_length() == 0
