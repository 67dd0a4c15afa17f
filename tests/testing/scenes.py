"""Scenes of one row that can be computed by hand: two channels, no rotation, one KV head unless said otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_longctx.testing.scene import Logits, Scene
from hf_longctx.testing.visible import Span


def unturned(x: Tensor, at: Tensor) -> Tensor:
    assert x.shape[:-1] == at.shape
    return x


def scene(q: object, k: object, spans: Sequence[Span], far: int | None = None) -> Scene:
    """q: `[Hq, n, 2]`, k: `[Hkv, n, 2]`, both as nested lists or tensors; values are the keys."""
    queries, keys = (torch.as_tensor(x, dtype=torch.float64) for x in (q, k))
    at = torch.arange(keys.shape[1]).expand(keys.shape[1], -1)
    at = at.masked_fill(at > at.T, -1)
    return Scene(queries, keys, keys, at, spans, far, unturned, Logits(1.0, None, None))
