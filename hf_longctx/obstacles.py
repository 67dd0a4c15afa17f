"""Why a call of one token cannot be recorded and replayed: one reason, in words."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .cache.cache import LongContextCache
from .cache.marks import Marks
from .models import CACHE, takes_positions
from .plan import Plan

_INERT = "transformers.utils.output_capturing"
"""Where transformers' own hooks come from: they stay on the modules, and do nothing unless asked for."""


class Guest(Protocol):
    """Whose hooks may be recorded: a hook, or what it is a method of, names it as `guest`."""

    def same(self) -> Hashable:
        """Equal for two calls in which the hooks do the same."""

    def buffers(self) -> list[Tensor]:
        """What the hooks read, and must find where it was."""


@dataclass(frozen=True)
class Obstacles:
    """What stands in the way on a model under a plan.

    Args:
        plan: in force.
        reason: what does not change, or None.
        hooks: of the modules inside the decoder, as they are at any time.
    """

    plan: Plan
    reason: str | None
    hooks: list[Mapping[int, Any]]
    _met: _Met = field(default_factory=lambda: _Met([], None, []), init=False, repr=False, compare=False)

    def now(self) -> str | None:
        """What stands in the way at this time, or None."""
        return self.reason or self._look().reason

    def guests(self) -> list[Guest]:
        """Whose hooks there are, as `now` has seen it."""
        return self._met.guests

    def _look(self) -> _Met:
        """Hooks are asked again when some came or went: there may be hundreds, and each step begins with this."""
        numbers = [number for hooks in self.hooks if hooks for number in hooks]
        met = self._met
        if numbers != met.numbers:
            foreign = foreign_hooks(self.hooks)
            each = [guest(hook) for hook in foreign]
            met.guests = list({id(guest): guest for guest in each if guest is not None}.values())
            odd = next((hook for hook, guest in zip(foreign, each, strict=True) if guest is None), None)
            name = getattr(odd, "__qualname__", type(odd).__name__)
            met.numbers, met.reason = numbers, None if odd is None else f"a module has a hook ({name})"
        return met


@dataclass(eq=False)
class _Met:
    """What is known of hooks, by the numbers that torch gives them, none of them twice."""

    numbers: list[int]
    reason: str | None
    guests: list[Guest]


def foreign_hooks(found: Iterable[Mapping[int, Any]]) -> list[Any]:
    """Hooks of modules without those that are transformers' own."""
    return [h for hooks in found if hooks for h in hooks.values() if getattr(h, "__module__", "") != _INERT]


def guest(hook: Any) -> Guest | None:
    found: Guest | None = getattr(getattr(hook, "__self__", hook), "guest", None)
    return found


def of_model(decoder: Any, plan: Plan) -> Obstacles:
    """Look at a decoder and a plan once."""
    inside = [module for module in decoder.modules() if module is not decoder]
    hooks = [hooks for module in inside for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    return Obstacles(plan, _of_plan(plan) or _of_modules(decoder, inside), hooks)


def _of_plan(plan: Plan) -> str | None:
    placements = {group.policy.placement for layer in plan.layers for group in layer.groups}
    if any(placement is not None and placement.disk is not None for placement in placements):
        return "blocks lie in files, which the device cannot read by itself"
    return None


def _of_modules(decoder: Any, inside: list[Any]) -> str | None:
    if any("_hf_hook" in vars(module) for module in (decoder, *inside)):
        return "accelerate moves what goes into a module"
    if any(hasattr(x, "device_mesh") for x in decoder.parameters()):
        return "the model's weights are split over several processes"
    if len({x.device for x in decoder.parameters()}) > 1:
        return "the model lies on several devices"
    if any(hasattr(type(module), "merged_adapters") for module in inside):
        return "adapters may be switched between two calls"
    kinds = {kind for module in inside for kind in _rope_types(module)} & {"dynamic", "longrope"}
    if kinds:
        return f"rotary frequencies of type {min(kinds)} follow the length of the text"
    if type(vars(decoder).get("forward")).__module__ != "hf_longctx.graph":
        return "something else stands in place of the decoder's forward"
    return None


def _rope_types(module: Any) -> set[str]:
    kind = getattr(module, "rope_type", None)
    return {kind} if isinstance(kind, str) else set(kind.values()) if isinstance(kind, dict) else set()


def of_cache(cache: LongContextCache) -> str | None:
    """What stands in the way of a call on a cache, or None."""
    behind = any(isinstance(s.index, Marks) and s.index.behind for layer in cache.stacks for _, s in layer.stores)
    return "representatives of the blocks that a longer call has closed are made first" if behind else None


def of_call(decoder: Any, kwargs: Mapping[str, Any], watched: bool, graphed: bool) -> str | None:
    """What stands in the way of one call, or None; graphed: as in `Recorder.takes`."""
    device = decoder.device.type
    if torch.is_grad_enabled() or decoder.training:
        return "gradients are on, or the model trains: call it under torch.no_grad(), after model.eval()"
    if watched:
        return "somebody looks at what heads choose or read"
    if graphed or torch.is_autocast_enabled(device):
        return "torch.compile or autocast is at work"
    if device == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a graph is being recorded already"
    config = decoder.config
    wants = ("output_hidden_states", "output_router_logits", "output_attentions")
    if any(kwargs.get(name, getattr(config, name, False)) for name in wants):
        return "hidden states or router logits are asked for"
    if kwargs.get("return_dict", getattr(config, "return_dict", True)) is False:
        return "the output is asked for as a tuple"
    plain = (Tensor, bool, int, float, str, type(None))
    odd = [n for n, x in kwargs.items() if n not in (CACHE, "hf_longctx") and not isinstance(x, plain)]
    if odd:
        return f"the argument {odd[0]} is a {type(kwargs[odd[0]]).__name__}"
    if kwargs.get("position_ids") is None and takes_positions(decoder) and not getattr(config, "rope_parameters", None):
        return "position_ids are left out, which this model does not count by columns"
    return None
