"""Where the linear layers and norms of a decoder layer are, found by the names that transformers' families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ....errors import UnsupportedError
from .apart import Experts

_ATTENTION = ("self_attn", "attention")
_AFTER = ("post_attention_layernorm",)
_SANDWICH = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


@dataclass(frozen=True)
class Rows:
    """Some output channels of a linear layer: all of `k_proj`, or the keys' part of a fused `qkv_proj`."""

    linear: nn.Linear
    start: int
    stop: int

    def map(self, change: Any) -> None:
        """Replace weight rows `[N, K]` and, with `[:, None]` around it, the bias by `change` of them."""
        self.linear.weight[self.start : self.stop] = change(self.linear.weight[self.start : self.stop])
        if self.linear.bias is not None:
            self.linear.bias[self.start : self.stop] = change(self.linear.bias[self.start : self.stop, None])[:, 0]

    def scale(self, factor: Tensor) -> None:
        """Multiply each output channel."""
        self.map(lambda x: x * factor[:, None])


@dataclass(frozen=True)
class Mlp:
    """A gated MLP of a layer: the only one, one expert, or one that all tokens share beside the experts.

    Attributes:
        name: in the layer's own; "" for the only one.
        up: rows that are multiplied, whole channel by whole channel, into the input of `down`.
        gate: rows that go through the activation first.
        down: its last layer.
    """

    name: str
    up: Rows
    gate: Rows
    down: nn.Linear

    def place(self, kind: str) -> str:
        """What `watching` calls the inputs of its `mlp` or `down`."""
        return f"{self.name}.{kind}" if self.name else kind


@dataclass(frozen=True)
class Block:
    """One decoder layer.

    Attributes:
        name: for messages.
        layer: the module.
        norms: before attention and before the MLP.
        q, k, v, o: of attention; `o` reads the heads' outputs.
        mlps: the MLP, or all experts.
        routers: modules that read what MLPs do and stay as they are, but for what its channels stand for.
        q_norm, k_norm: over the channels of each head, None without.
        q_heads, kv_heads, head_dim: of attention.
    """

    name: str
    layer: nn.Module
    norms: tuple[nn.Module, nn.Module]
    q: Rows
    k: Rows
    v: Rows
    o: nn.Linear
    mlps: tuple[Mlp, ...]
    routers: tuple[Any, ...]
    q_norm: nn.Module | None
    k_norm: nn.Module | None
    q_heads: int
    kv_heads: int
    head_dim: int

    @property
    def readers(self) -> tuple[tuple[nn.Module, tuple[Any, ...]], ...]:
        """Each norm, and the linear layers and routers that read what it gives."""
        attention = dict.fromkeys(rows.linear for rows in (self.q, self.k, self.v))
        mlp = dict.fromkeys(rows.linear for each in self.mlps for rows in (each.gate, each.up))
        return (self.norms[0], tuple(attention)), (self.norms[1], (*mlp, *self.routers))

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q_heads // self.kv_heads


def layers_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers.

    Raises:
        UnsupportedError: the decoder has no list of layers by that name.
    """
    decoder: Any = model.get_decoder()  # type: ignore[no-untyped-call]
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise _refused(model.config.model_type, "a decoder with a list of `layers`", type(decoder).__name__)
    name = next(name for name, module in model.named_modules() if module is layers)
    return name, layers


def block_of(layer: nn.Module, name: str, config: Any) -> Block:
    """The parts of a decoder layer.

    Raises:
        UnsupportedError: not a layer of two norms, attention of separate or fused q, k, v, and a gated MLP; says what
            is missing.
    """
    family = config.model_type

    def need(owner: nn.Module, *names: str) -> Any:
        found = [getattr(owner, each, None) for each in names]
        for each in found:
            if each is not None:
                return each
        raise _refused(family, f"{' or '.join(names)} in {name}", "none")

    attention, mlp = need(layer, *_ATTENTION), need(layer, "mlp")
    extra = [each for each in _SANDWICH if hasattr(layer, each)]
    if extra:
        raise _refused(family, f"a norm before attention and one before the MLP in {name}", f"also {extra[0]}")
    norms = (need(layer, "input_layernorm"), need(layer, *_AFTER))
    heads = int(config.num_attention_heads)
    kv = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(attention, "head_dim", 0) or config.hidden_size // heads)
    sizes = (heads * width, kv * width, kv * width)
    q, k, v = _parts(attention, ("q_proj", "k_proj", "v_proj"), "qkv_proj", sizes, need)
    mlps, routers = _mlps(mlp, need)
    q_norm, k_norm = (getattr(attention, each, None) for each in ("q_norm", "k_norm"))
    o = need(attention, "o_proj")
    found = [q.linear, k.linear, v.linear, o]
    found += [x for each in mlps for x in (each.gate.linear, each.up.linear, each.down)]
    odd = [type(x).__name__ for x in found if not isinstance(x, nn.Linear)]
    if odd:
        raise _refused(family, f"linear layers in {name}", odd[0])
    return Block(name, layer, norms, q, k, v, o, mlps, routers, q_norm, k_norm, heads, kv, width)


def _mlps(mlp: Any, need: Any) -> tuple[tuple[Mlp, ...], tuple[Any, ...]]:
    """The MLPs of a module, and what tells tokens which of them to take."""
    if not isinstance(getattr(mlp, "experts", None), Experts):
        return (_mlp("", mlp, need),), ()
    found = [Mlp(f"experts.{number}", *_halves(each.gate_up), each.down) for number, each in enumerate(mlp.experts)]
    others, routers = [], []
    for name, module in mlp.named_children():
        if hasattr(module, "down_proj"):
            others.append(_mlp(name, module, need))
        elif getattr(module, "weight", None) is not None:
            routers.append(module)
    return (*found, *others), tuple(routers)


def _mlp(name: str, mlp: nn.Module, need: Any) -> Mlp:
    inner = int(need(mlp, "down_proj").in_features)
    gate, up = _parts(mlp, ("gate_proj", "up_proj"), "gate_up_proj", (inner, inner), need)
    return Mlp(name, up, gate, need(mlp, "down_proj"))


def _halves(linear: nn.Linear) -> tuple[Rows, Rows]:
    """Up and gate of an expert's first layer."""
    half = linear.out_features // 2
    return Rows(linear, half, 2 * half), Rows(linear, 0, half)


def _parts(owner: nn.Module, apart: tuple[str, ...], fused: str, sizes: tuple[int, ...], need: Any) -> list[Rows]:
    """The rows of each of several layers, or of the one that holds them all."""
    one = getattr(owner, fused, None)
    if one is None:
        return [Rows(need(owner, name, fused), 0, size) for name, size in zip(apart, sizes, strict=True)]
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [Rows(one, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _refused(family: str, expected: str, got: str) -> UnsupportedError:
    advice = "Load it with QoQConfig instead, which rounds weights to the nearest"
    return UnsupportedError(f"quantize: expected {expected}; got {got}, in '{family}'. {advice}.")
