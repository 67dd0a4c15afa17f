"""Where a backward pass ends: at what was stored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedError


class Stored(torch.autograd.Function):
    """The result of attention over stored tokens: keys and values were read back, cut off from their gradient.

    To decode without `no_grad` is common and works; to go backward through it would give a part of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, *fresh: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise UnsupportedError(
            "hf_longctx: expected a backward pass through one call on a whole text; got one through a call that went "
            "on from a filled cache, or that read its keys and values as they are stored, without a gradient. "
            "Pass the text in one call, or train with another method."
        )
