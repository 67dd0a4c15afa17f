"""What makes a loaded model one of many tenants: `generate(adapter_names=...)`, and a few methods more."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...errors import UnsupportedError
from .bits import restore
from .format import Delta
from .message import say
from .places import weight_of
from .sources import open_delta
from .split import require_whole
from .tenants import Deltas

_KEY = "_hf_longctx_deltas"
_NAMES = "adapter_names"


def state_of(model: Any) -> Deltas:
    """The tenants of a model.

    Raises:
        ValueError: it has none.
    """
    state: Deltas | None = vars(model).get(_KEY)
    if state is None:
        raise ValueError(
            say("deltas", "a model that loads deltas", type(model).__name__, "Call hf_longctx.deltas.load")
        )
    return state


def device_bytes(model: Any) -> int:
    """Bytes that the tenants of a model take on its device, 0 without any."""
    state: Deltas | None = vars(model).get(_KEY)
    return 0 if state is None else state.device_bytes


def install(model: Any, deltas: Mapping[str, Delta], slots: int) -> Deltas:
    """Hang tenants on a model; if one does not fit, the model is as it was.

    Raises:
        ValueError: the model has tenants already, or a delta does not fit it.
        UnsupportedError: something differs that cannot differ between rows of a batch.
    """
    if _KEY in vars(model):
        raise ValueError(say("deltas.load", "a model without deltas", "one that has some", "Call model.add_delta"))
    if slots < 1:
        raise ValueError(say("deltas.load", "at least 1 slot", slots, "Change slots"))
    state = Deltas(model, model.get_decoder(), slots)
    try:
        for name, delta in deltas.items():
            state.add(name, delta)
    except BaseException:
        state.remove()
        raise
    outer = model.register_forward_pre_hook(_Names(state), with_kwargs=True, prepend=True)
    ended = model.register_forward_hook(_Ended(state), always_call=True)
    inner = state.decoder.register_forward_pre_hook(_Enter(state), with_kwargs=True)
    state.handles += [outer, ended, inner]
    model.__dict__.update({_KEY: state, **{name: kind(state) for name, kind in _METHODS.items()}})
    return state


def remove(model: Any) -> None:
    """Take all tenants off a model: it computes bit for bit what the base does."""
    state_of(model).remove()
    for name in (_KEY, *_METHODS):
        del model.__dict__[name]


@dataclass(eq=False)
class _OfState:
    """A callable of a model; no closure, so that models are still copied with what hangs on them."""

    state: Deltas


class _Names(_OfState):
    """Before the model: takes `adapter_names` out of a call."""

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The call without it; its rows are those of the names until it ends."""
        try:
            self.state.begin(kwargs.pop(_NAMES, None))
        except BaseException:
            self.state.begin(None)  # torch will call `_Ended` all the same
            raise
        return args, kwargs


class _Ended(_OfState):
    """After the model, also if it fails."""

    def __call__(self, model: Any, args: tuple[Any, ...], output: Any) -> None:
        """Names hold for one call."""
        self.state.end()


class _Enter(_OfState):
    """Before the decoder."""

    def __call__(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """How many rows there are."""
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        if tokens is not None:
            self.state.enter(len(tokens))


class _Generate(_OfState):
    """In place of `generate`: takes PEFT's keyword for mixed batches."""

    @property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(type(self.state.model).generate)
        return own.replace(parameters=list(own.parameters.values())[1:])

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Generate, each row by the tenant of its name; without names by the active one.

        Raises:
            ValueError: an unknown name, more tenants than slots, other than a name for each row, or a token that a
                row's tenant does not have; nothing was computed.
        """
        model = self.state.model
        given = [*args[:1], kwargs.get("inputs"), kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        tokens = next((x for x in given if isinstance(x, torch.Tensor)), None)
        with self.state.calling(adapter_names):
            if tokens is not None:
                self.state.check_rows(tokens)
            return type(model).generate(model, *args, **kwargs)


class _Add(_OfState):
    """`model.add_delta`."""

    def __call__(self, name: str, delta: Any) -> None:
        """Register a tenant: a folder, a hub id, a published `.pt` file or a `Delta`; raises as `deltas.load`."""
        self.state.add(name, open_delta(delta))


class _Delete(_OfState):
    """`model.delete_delta`."""

    def __call__(self, name: str) -> None:
        """Forget a tenant. Raises ValueError if there is none, or rows of it are being generated."""
        self.state.delete(name)


class _Set(_OfState):
    """`model.set_delta`."""

    def __call__(self, name: str | None) -> None:
        """Whose rows are where a call names nobody; None: the base's. Raises ValueError if there is no such tenant."""
        self.state.check([] if name is None else [name])
        self.state.active = name


class _Merge(_OfState):
    """`model.merge_delta`."""

    def __call__(self, name: str) -> Any:
        """Make the model the fine-tune, in its own weights; hooks and methods of deltas are gone.

        Raises:
            ValueError: there is no such tenant, or there are others, whose base would be lost.
            UnsupportedError: weights are quantized, or several processes share them.
        """
        state = self.state
        require_whole(state.model, "merge_delta")
        state.check([name])
        if len(state.tenants) > 1:
            others = ", ".join(other for other in state.tenants if other != name)
            raise ValueError(
                say("merge_delta", "no other tenants of the base", others, "Call model.delete_delta first")
            )
        delta, model = state.tenants[name], state.model
        for key in delta.matrices:
            _floating(model, key)
        remove(model)
        merge(model, delta)
        return model


class _List(_OfState):
    """`model.deltas`."""

    def __call__(self) -> dict[str, str]:
        """Each tenant, and where it is: `device` or `host`."""
        return {name: "device" if name in self.state.resident else "host" for name in self.state.tenants}


_METHODS: dict[str, type[_OfState]] = {
    "generate": _Generate,
    "add_delta": _Add,
    "delete_delta": _Delete,
    "set_delta": _Set,
    "merge_delta": _Merge,
    "deltas": _List,
}


@torch.no_grad()
def merge(model: Any, delta: Delta) -> None:
    """Write a delta into the weights of its base."""
    for name, matrix in delta.matrices.items():
        weight, turned = _floating(model, name)
        difference = restore(matrix).to(weight.device)
        weight.copy_(weight.float() + (difference.T if turned else difference))
    first, last = model.get_input_embeddings(), model.get_output_embeddings()
    tied = last is not None and last.weight is first.weight
    if tied and not delta.config.get("tie_word_embeddings", True):
        last.weight = nn.Parameter(first.weight.clone(), requires_grad=first.weight.requires_grad)
        model.config.tie_word_embeddings = tied = False
    for name in delta.dense:
        key, _, part = name.rpartition(".")
        module, value = model.get_submodule(key), delta.weight(name)
        own = getattr(module, part)
        if own is not None and own.shape == value.shape:
            own.copy_(value)
        else:
            like = next(module.parameters())
            setattr(module, part, nn.Parameter(value.to(like.device, like.dtype), requires_grad=like.requires_grad))
    _settle(model, first, last, tied or bool(delta.config.get("tie_word_embeddings")))


def _settle(model: Any, first: Any, last: Any, tied: bool) -> None:
    """Sizes and ties of the embeddings, after a merge."""
    if last is not None and tied:
        last.weight = first.weight
        model.config.tie_word_embeddings = True
    first.num_embeddings = len(first.weight)
    if last is not None:
        last.out_features = len(last.weight)
    model.config.get_text_config(decoder=True).vocab_size = len(first.weight)


def _floating(model: Any, name: str) -> tuple[torch.Tensor, bool]:
    """A weight in floating point, and whether it is `[K, N]`."""
    found = weight_of(model, name)
    if found is None or not found[0].is_floating_point():
        advice = "Quantized weights cannot take it: merge into the base in 16 bits, then quantize"
        raise UnsupportedError(say(f"merge_delta, {name}", "weights in floating point", "others", advice))
    return found
