"""What flows into each decoder layer, so that layers can be run one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .blocks import Block

Inputs = list[Tensor]
"""Batches `[B, T, H]` float32 of a residual stream, on the CPU."""


class _EnoughError(Exception):
    """The first layer was reached."""


@dataclass(frozen=True)
class Call:
    """What a layer is called with beside the residual stream; the same for every text, as all are equally long."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """The residual stream `[B, T, H]` after the layer."""
        device = hidden.device
        args, kwargs = _move(self.args, device), _move(self.kwargs, device)
        out = layer(hidden, *args, **kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


def _move(value: Any, device: torch.device) -> Any:
    """Tensors inside, on a device, floating ones as float32."""
    if isinstance(value, Tensor):
        return value.to(device, torch.float32 if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {key: _move(each, device) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_move(each, device) for each in value)
    return value


@torch.no_grad()
def calls(model: PreTrainedModel, layers: nn.ModuleList, ids: Tensor) -> list[Call]:
    """How each layer is called, seen on one text `[1, T]`."""
    found: dict[int, Call] = {}

    def note(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found[index] = Call(args[1:], {name: x for name, x in kwargs.items() if name != "hidden_states"})

        return hook

    handles = [layer.register_forward_pre_hook(note(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
        decoder(input_ids=ids.to(decoder.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [found[i] for i in range(len(layers))]


@torch.no_grad()
def embed(model: PreTrainedModel, layers: nn.ModuleList, ids: Tensor, batch: int) -> Inputs:
    """The residual stream before the first layer, of texts `[S, T]`, a few at a time."""
    out: Inputs = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        out.append((args[0] if args else kwargs["hidden_states"]).float().cpu())
        raise _EnoughError

    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    handle = layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        for part in torch.split(ids, batch):
            try:
                decoder(input_ids=part.to(decoder.device), use_cache=False)
            except _EnoughError:
                continue
    finally:
        handle.remove()
    return out


@dataclass
class Seen:
    """What a place in a layer has seen: `moments` `[K, K]`, mean of the products; `size` `[K]`, largest magnitudes."""

    moments: Tensor
    size: Tensor
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        """Note inputs `[..., K]`."""
        flat = x.reshape(-1, x.shape[-1]).float()
        self.size = torch.maximum(self.size, flat.abs().amax(0))
        share = len(flat) / (self.tokens + len(flat))
        self.moments.lerp_(flat.T @ flat / len(flat), share)
        self.tokens += len(flat)


@dataclass
class Keys:
    """Largest magnitudes of the channels of keys, `[Hkv, D]`: of a rotated pair, both have that of the pair."""

    size: Tensor
    rotary: int

    def add(self, keys: Tensor) -> None:
        """Note keys `[..., Hkv, D]`, not rotated yet."""
        flat, half = keys.reshape(-1, *self.size.shape).float(), self.rotary // 2
        pair = torch.hypot(flat[..., :half], flat[..., half : self.rotary])
        both = torch.cat((pair, pair, flat[..., self.rotary :].abs()), -1)
        self.size = torch.maximum(self.size, both.amax(0))


@contextmanager
def watching(block: Block, rotary: int) -> Iterator[tuple[dict[str, Seen], Keys]]:
    """Note what comes into the linear layers of a block, and its keys, while it runs.

    Args:
        block: that runs.
        rotary: channels of a head that are rotated.

    Yields:
        What was seen by `attention`, `o`, and `mlp` and `down` of each MLP, and the keys.
    """
    notes: dict[str, Seen] = {}
    keys = Keys(block.o.weight.new_zeros(block.kv_heads, block.head_dim), rotary)

    def note(name: str) -> Callable[..., None]:
        return lambda module, args: notes[name].add(args[0])

    def note_keys(module: nn.Module, args: Any, out: Tensor) -> None:
        keys.add(out if block.k_norm is not None else out[..., block.k.start : block.k.stop])

    handles = [(block.k_norm or block.k.linear).register_forward_hook(note_keys)]
    places = {"attention": block.q.linear, "o": block.o}
    for each in block.mlps:
        places |= {each.place("mlp"): each.up.linear, each.place("down"): each.down}
    for name, linear in places.items():
        width = linear.in_features
        notes[name] = Seen(linear.weight.new_zeros(width, width), linear.weight.new_zeros(width))
        handles.append(linear.register_forward_pre_hook(note(name)))
    try:
        yield notes, keys
    finally:
        for handle in handles:
            handle.remove()
