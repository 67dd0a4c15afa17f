"""Gates on KV heads: each says a mixture of what it reads of all keys and of what it would read as a streaming head.

Paper: DuoAttention (arXiv:2410.10819) §2.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..context import Read
from ..kernels import ops
from ..models import decoder_of
from .lessons import Lesson
from .pattern import message
from .tap import tapped

ROLE = 0.5
"""A head below this gate counts as streaming."""


class Gates(nn.Module):
    """One number for each KV head, in float32: 1 reads all keys, 0 streams.

    Args:
        heads: KV heads with a gate in each layer; 0 for a layer that has a sliding window of its own.
    """

    def __init__(self, heads: Sequence[int]) -> None:
        super().__init__()
        self.heads = list(heads)
        self.alpha = nn.Parameter(torch.ones(sum(heads)))

    def forward(self) -> tuple[Tensor, ...]:
        """The gates of each layer, `[Hkv]`."""
        return self.alpha.split_with_sizes(self.heads)

    @torch.no_grad()
    def clamp(self) -> None:
        """Bring them back into [0, 1]."""
        self.alpha.clamp_(0.0, 1.0)

    @property
    def sparsity(self) -> float:
        """Share of them that is below one half."""
        return float((self.alpha.detach() < ROLE).float().mean())

    def rows(self, kv_heads: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        """`[L][Hkv]` for a pattern; 0 in layers without gates, whose heads stream by themselves."""
        layers = self.alpha.detach().cpu().split_with_sizes(self.heads)
        return tuple(
            tuple(gates.tolist()) if len(gates) else (0.0,) * width
            for gates, width in zip(layers, kv_heads, strict=True)
        )


@dataclass(frozen=True)
class Mix:
    """A tap through which heads speak as their gates say.

    Args:
        gates: for each layer `[Hkv]`, or empty.
        sink: first tokens that a streaming head sees.
        window: last tokens that it sees, the query's own included.
    """

    gates: Sequence[Tensor]
    sink: int
    window: int

    def __call__(self, read: Read) -> Tensor:
        """`gate * all + (1 - gate) * streaming`, in float32 or better; exact at both ends."""
        gates = self.gates[read.layer]
        if not len(gates):
            return read.out
        see = replace(read.see, sink=self.sink, window=self.window)
        near = ops.attend_blocks(read.q, read.k, read.v, read.logits, see, None)
        work = torch.promote_types(near.dtype, torch.float32)
        each = gates.to(near.device, work).repeat_interleave(near.shape[1] // len(gates))
        return torch.lerp(near.to(work), read.out.to(work), each[:, None, None]).to(near.dtype)


def distance(
    model: PreTrainedModel, gates: Sequence[Tensor], lesson: Lesson, sink: int, window: int, recompute: bool = True
) -> Tensor:
    """How far gates move the model: `[]`, the mean squared difference of its last hidden states, after the final norm.

    The model with all keys is read without a gradient; logits are never formed.

    Args:
        model: patched with `dense`; its weights are best `frozen`.
        gates: as in `Mix`, like the next two but one.
        lesson: what is read, and where it is compared.
        sink: first tokens.
        window: last tokens.
        recompute: run each layer again in the backward pass in place of holding what it computed.

    Raises:
        ValueError: the model is not patched, or has no layers that can be run again.
    """
    decoder, _ = decoder_of(model)
    ids = lesson.ids[None].to(decoder.device)
    with torch.no_grad():
        aim = _states(decoder, ids)
    with tapped(model, Mix(gates, sink, window)), recomputed(decoder) if recompute else nullcontext():
        found = _states(decoder, ids)
    return (found - aim).square().mean(-1) @ lesson.shares.to(aim)


def _states(decoder: Any, ids: Tensor) -> Tensor:
    """Hidden states, `[T, hidden]`, float32 or better."""
    states: Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
    return states.to(torch.promote_types(states.dtype, torch.float32))


@contextmanager
def recomputed(decoder: nn.Module) -> Iterator[None]:
    """Layers that run inside the block run again in the backward pass: what they compute is not held until then.

    It is torch's checkpoint around transformers' own layers. Their switch would ask for train mode, which has dropout.

    Raises:
        ValueError: no layer can be run again.
    """
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        advice = "Turn gradient checkpointing off"
        raise ValueError(message("gates", "layers that can be run again", type(decoder).__name__, advice))
    before = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.__dict__["forward"] = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.__dict__["forward"]
            else:
                layer.__dict__["forward"] = own


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Weights without gradients inside the block, and evaluation mode; afterwards both are as they were."""
    asked = [weight for weight in model.parameters() if weight.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    for weight in asked:
        weight.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for weight in asked:
            weight.requires_grad_(True)
        for module, training in modes:
            module.training = training
