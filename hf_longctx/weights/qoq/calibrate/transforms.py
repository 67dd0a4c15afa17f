"""Changes of the weights of a decoder layer that leave what it computes, and make it easier to quantize.

Paper: QServe (arXiv:2405.04532) §4.2 SmoothAttention, §4.3.1 rotation, §4.3.2 output smoothing, §4.3.3 reordering.
Differs: the size of a key is that of its rotated pair, which no position changes; it is the larger of keys before and
after the rotation. Values are rotated head by head also where the residual stream is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....errors import UnsupportedError
from .blocks import Block, Mlp, Rows
from .hadamard import hadamard

_LEAST = 1e-5


@dataclass(frozen=True)
class Change:
    """What became of the input channels of a linear layer: channel i is now `order[i]` over `divisor[i]`."""

    divisor: Tensor
    order: Tensor

    def moments(self, moments: Tensor) -> Tensor:
        """Moments `[K, K]` of the old inputs, as those of the new ones."""
        return moments[self.order][:, self.order] / (self.divisor[:, None] * self.divisor[None, :])


def gain(norm: nn.Module, width: int) -> Tensor:
    """Factors `[width]` float32 of an RMSNorm, whether its weight is they or they less 1.

    Raises:
        UnsupportedError: it takes the mean off, or adds something.
    """
    weight: Any = norm.weight
    probe = torch.ones(2, width, dtype=torch.float32, device=weight.device)
    probe[1, ::2] = -1
    with torch.no_grad():
        seen: Tensor = norm(probe.to(weight.dtype))
    one, other = seen.float().unbind()
    if not torch.allclose(one.abs(), other.abs(), rtol=1e-2, atol=1e-4) or not torch.allclose(one[1::2], other[1::2]):
        raise UnsupportedError(
            f"quantize: expected RMSNorm to rotate the residual stream; got {type(norm).__name__}. Leave out --rotate."
        )
    return one


def set_gain(norm: nn.Module, factors: Tensor) -> None:
    """Make the factors of an RMSNorm these, `[width]`; its weight is they, or they less 1 (Gemma)."""
    weight: Any = norm.weight
    now = gain(norm, len(factors))
    less = bool((weight.float() + 1 - now).abs().max() < (weight.float() - now).abs().max())
    weight.copy_(factors - 1 if less else factors)


def rotate_block(block: Block, turn: Tensor) -> None:
    """Have a layer read and write a residual stream that is multiplied by `turn` `[H, H]`; its norms become ones."""
    for norm, readers in block.readers:
        factors = gain(norm, len(turn))
        for linear in readers:
            linear.weight.copy_((linear.weight * factors) @ turn)
        set_gain(norm, torch.ones_like(factors))
    for linear in (block.o, *(each.down for each in block.mlps)):
        Rows(linear, 0, linear.out_features).map(lambda x: turn.T @ x)


def rotate_values(block: Block) -> None:
    """Rotate the values of each head, and back where the output projection reads them."""
    turn = hadamard(block.head_dim).to(block.o.weight)
    block.v.map(lambda x: turn_heads(x.T, turn).T)
    block.o.weight.copy_(turn_heads(block.o.weight, turn))


def turn_heads(x: Tensor, turn: Tensor) -> Tensor:
    """Multiply the channels of each head in `[R, heads * D]` by `turn` `[D, D]`."""
    return (x.reshape(len(x), -1, len(turn)) @ turn).flatten(1)


def smooth_attention(block: Block, size: Tensor, alpha: float) -> None:
    """Divide key channels by their size to the power `alpha`, and multiply queries by it.

    Args:
        block: whose q and k are changed.
        size: `[Hkv, D]`, largest magnitude of each channel of a key; the same for both of a rotated pair.
        alpha: 0 changes nothing.
    """
    if block.k_norm is not None:
        size = size.amax(0, keepdim=True).expand_as(size)
    factor = size.clamp(min=_LEAST).pow(alpha)
    factor = factor / factor.log().mean(1, keepdim=True).exp()  # keys as a whole stay about as large
    if block.k_norm is None or block.q_norm is None:
        block.k.scale(1 / factor.flatten())
        block.q.scale(factor.repeat_interleave(block.group, 0).flatten())
        return
    for norm, by in ((block.k_norm, 1 / factor[0]), (block.q_norm, factor[0])):
        weight: Any = norm.weight
        if weight.shape != by.shape:
            raise UnsupportedError(
                f"quantize: expected a norm over the channels of a head in {block.name}; got one of shape "
                f"{list(weight.shape)}. Pass --smooth-attention 0."
            )
        set_gain(norm, gain(norm, len(by)) * by)


def smooth_down(mlp: Mlp, size: Tensor, alpha: float, beta: float) -> Tensor:
    """Divide the input channels of `down` by `size^alpha / |W|^beta`, in the rows of `up`; gives the divisors `[K]`."""
    weight = mlp.down.weight.abs().amax(0)
    divisor = size.clamp(min=_LEAST).pow(alpha) / weight.clamp(min=_LEAST).pow(beta)
    divisor = divisor / divisor.log().mean().exp()
    mlp.up.scale(1 / divisor)
    mlp.down.weight.mul_(divisor)
    return divisor


def smooth_values(block: Block, size: Tensor, alpha: float, beta: float) -> Tensor:
    """The same for `o` and the rows of `v`; query heads of a KV head share divisors. Gives them, `[Hq * D]`."""
    shape = (block.kv_heads, block.group, block.head_dim)
    weight = block.o.weight.abs().amax(0).view(shape).amax(1)
    size = size.view(shape).amax(1)
    divisor = size.clamp(min=_LEAST).pow(alpha) / weight.clamp(min=_LEAST).pow(beta)
    divisor = divisor / divisor.log().mean().exp()
    block.v.scale(1 / divisor.flatten())
    spread = divisor[:, None].expand(shape).flatten()
    block.o.weight.mul_(spread)
    return spread


def reorder_down(mlp: Mlp, size: Tensor) -> Tensor:
    """Sort the input channels of `down` by size, the largest first, so that a group holds equals; gives the order."""
    order = size.argsort(descending=True, stable=True)
    for rows in (mlp.gate, mlp.up):
        rows.map(lambda x: x[order])
    mlp.down.weight.copy_(mlp.down.weight[:, order])
    return order
