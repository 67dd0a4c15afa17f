"""What attention is in a graph of a compiler (`torch.compile`): for each layer a node `torch.ops.hf_longctx.attention`.

A node knows its layer's number. All else, the plan, the cache and where the call's tokens stand, it finds when it runs:
no graph is made anew when a cache grows, and what is stored and chosen is what calls without a compiler would.
It is registered when this is imported, which the first traced call does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .attention import HARMLESS, attend
from .context import current
from .kernels.between import between_graphs
from .kernels.traced import Operation, Row

_PASSED = ("s_aux", "slopes", "softcap", "sliding_window")
_SAID = {"is_causal": True, "output_attentions": False}


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    s_aux: Tensor | None,
    slopes: Tensor | None,
    softcap: float | None,
    sliding_window: int | None,
    scaling: float | None,
    layer: int,
    name: str,
) -> Tensor:
    """`attention.attention` of a layer in the current call: `[B, T, Hq, Dv]`."""
    others = {"s_aux": s_aux, "slopes": slopes, "softcap": softcap, "sliding_window": sliding_window}
    return attend(current(), name, layer, query, key, value, scaling, 0.0, others)


def _output(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


OPERATION = Operation("attention", Row(_output), _attention, _attention)


def attention(
    name: str,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    others: Mapping[str, Any],
) -> Tensor:
    """One node; or, where it would lose something, the call as ever between two graphs. Arguments as `attend`."""
    odd = [key for key, x in others.items() if key not in _PASSED and key not in HARMLESS and x is not None]
    if dropout or any(others[key] != _SAID.get(key) for key in odd):
        return _as_it_is_odd(name, layer, query, key, value, scaling, dropout, others)
    sinks, slopes, softcap, window = (others.get(key) for key in _PASSED)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, key, value, sinks, slopes)):
        return _for_gradients(name, layer, query, key, value, scaling, dropout, others)
    out: Tensor = OPERATION.overload(query, key, value, sinks, slopes, softcap, window, scaling, layer, name)
    return out


@between_graphs("attention has no gradient in a graph; it is recorded outside it")
def _for_gradients(*arguments: Any) -> Tensor:
    return attend(current(), *arguments)


@between_graphs("an argument of attention that is looked at outside of graphs")
def _as_it_is_odd(*arguments: Any) -> Tensor:
    return attend(current(), *arguments)
