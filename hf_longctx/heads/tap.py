"""A function at the seam: it sees what every group of heads read, and what it returns is what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..context import Read
from ..kernels.types import Logits
from ..patch import state_of
from .pattern import message
from .scores import Head

CHUNK = 1 << 14
"""Keys that are looked at at a time: what is held beside the best so far does not grow with the text."""


@contextmanager
def tapped(model: PreTrainedModel, tap: Callable[[Read], Tensor]) -> Iterator[None]:
    """Put a function between the heads and the model while the block runs; inside another, it comes after that.

    Args:
        model: patched with a method that reads everything, such as `dense`; steps are not recorded meanwhile.
        tap: given what a group read, returns what stands for its output, `read.out` to change nothing.

    Raises:
        ValueError: the model is not patched.
    """
    state = state_of(model)
    if state is None:
        raise ValueError(message("tapped", "a patched model", "an unpatched one", "Patch it with 'dense'"))
    before: Callable[[Read], Tensor] | None = state.tap
    state.tap = tap if before is None else lambda read: tap(replace(read, out=before(read)))
    try:
        yield
    finally:
        state.tap = before


class Gaze:
    """A tap that notes where the last queries of each call look hardest, and how hard.

    Args:
        queries: of each row and call, the last real ones.
        top: keys whose share of the attention is added up.
    """

    def __init__(self, queries: int = 1, top: int = 4) -> None:
        self.queries, self.top = queries, top
        self._calls: list[dict[tuple[int, tuple[int, ...]], tuple[Tensor, Tensor]]] = []

    def __call__(self, read: Read) -> Tensor:
        """Look; the output stays."""
        group = read.layer, tuple(read.q_heads)
        if not self._calls or group in self._calls[-1]:
            self._calls.append({})
        self._calls[-1][group] = strongest(read, self.queries, self.top)
        return read.out

    def last(self, calls: int) -> dict[Head, list[Tensor]]:
        """By layer and query head, over the last calls.

        Returns:
            `[B, calls * queries]` int64, the place in the row's text of the key with most attention; and float32, the
            share of the attention that the `top` strongest keys have. On the CPU.
        """
        found: dict[Head, list[Tensor]] = {}
        for layer, heads in self._calls[-1]:
            both = (torch.cat([call[layer, heads][i] for call in self._calls[-calls:]], 2).cpu() for i in range(2))
            found |= {(layer, head): each for head, *each in zip(heads, *(x.unbind(1) for x in both), strict=True)}
        return dict(sorted(found.items()))


def strongest(read: Read, queries: int, top: int, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Where the last queries of each row look: keys are read chunk by chunk, and no row of weights is kept.

    Args:
        read: of one group of heads.
        queries: the last n real tokens of each row in the call; where it has fewer, the first stands for those missing.
        top: strongest keys, at most all.
        chunk: keys at a time.

    Returns:
        `[B, Hq', n]`, int64, the position with most attention, and float32, the share of the `top` strongest.
    """
    q, q_pos = _last(read, queries)
    rows, heads, count, dim = q.shape
    kv_heads = read.k.shape[1]
    grouped = q.float().reshape(rows, kv_heads, -1, dim)
    places = torch.arange(read.k.shape[2], device=q.device)[None] if read.see.k_pos is None else read.see.k_pos
    best = torch.full((rows, heads, count, 0), -torch.inf, device=q.device)
    where = torch.zeros((rows, heads, count, 0), dtype=torch.int64, device=q.device)
    total = torch.full((rows, heads, count), -torch.inf, device=q.device)
    if read.logits.sink_logits is not None:
        total = read.logits.sink_logits.float().to(q.device)[None, :, None].expand_as(total)
    for start in range(0, read.k.shape[2], chunk):
        k_pos = places[:, start : start + chunk]
        x = grouped @ read.k[:, :, start : start + chunk].float().transpose(2, 3)
        x = _shaped(x.view(rows, heads, count, -1), read.logits, q_pos, k_pos)
        x = x.masked_fill(~_visible(read, q_pos, k_pos), -torch.inf)
        total = torch.logaddexp(total, x.logsumexp(-1))
        best = torch.cat((best, x), -1)
        where = torch.cat((where, k_pos[:, None, None].expand_as(x)), -1)
        best, order = best.topk(min(top, best.shape[-1]), dim=-1)
        where = where.gather(-1, order)
    return where[..., 0], (best - total[..., None]).exp().sum(-1)


def _last(read: Read, count: int) -> tuple[Tensor, Tensor]:
    """The last queries of each row, `[B, Hq', n, D]`, and their positions, `[B, n]`."""
    step, rows = read.step, read.q.shape[0]
    back = torch.arange(count, 0, -1, device=read.q.device)
    index = (step.lengths_after[:, None] - step.lengths[:, None] - back).clamp(min=0).expand(rows, -1)
    q = read.q.gather(2, index[:, None, :, None].expand(-1, read.q.shape[1], -1, read.q.shape[3]))
    return q, step.lengths[:, None] + index


def _shaped(x: Tensor, logits: Logits, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Logits `[B, Hq', n, C]` from products."""
    x = x * logits.scale
    if logits.softcap is not None:
        x = logits.softcap * torch.tanh(x / logits.softcap)
    if logits.slopes is not None:
        x = x + logits.slopes.to(x).view(1, -1, 1, 1) * (k_pos[:, None] - q_pos[:, :, None])[:, None]
    return x


def _visible(read: Read, q_pos: Tensor, k_pos: Tensor) -> Tensor:
    """Which keys each query sees: `[B, 1, n, C]`, bool."""
    q_pos, k_pos = q_pos[:, None, :, None], k_pos[:, None, None]
    seen = (k_pos >= 0) & (k_pos <= q_pos)
    if read.see.window is not None:
        seen &= (k_pos < read.see.sink) | (q_pos - k_pos < read.see.window)
    return seen
