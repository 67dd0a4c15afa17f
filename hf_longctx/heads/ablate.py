"""Query heads that say something else than they would: nothing, their mean, the mean of all values, or what is near."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..context import Read
from ..kernels import ops
from ..models import inspect_model
from .pattern import message
from .scores import Head
from .tap import tapped

MODES = ("zero", "mean", "uniform", "local")
PHASES = ("prefill", "decode")


@contextmanager
def ablated(
    model: PreTrainedModel,
    heads: Collection[Head],
    mode: str = "zero",
    phases: Collection[str] = PHASES,
    window: int = 64,
    means: Mapping[Head, Tensor] | None = None,
) -> Iterator[None]:
    """Ablate query heads for as long as the block runs.

    The last query of each call is the one that writes, and counts as `decode`; all others as `prefill`. (So does the
    last one of each chunk where a prompt is read in chunks: read it in one call where that matters.)

    Args:
        model: patched with a method that reads everything, such as `dense`.
        heads: (layer, query head); none changes nothing.
        mode: `zero`: no output; `mean`: always the same output, that of `means`; `uniform`: the mean of all values that
            it sees; `local`: attention to its last `window` tokens only.
        phases: in which queries: `prefill`, `decode` or both.
        window: of `local`, in tokens, the query's own included.
        means: of `mean`, `[Dv]` for each head; `mean_outputs` finds them.

    Raises:
        ValueError: a head that the model does not have, an unknown mode or phase, a window below 1, no means, or a
            model that is not patched.
    """
    check(heads, [layer.q_heads for layer in inspect_model(model).layers])
    if mode not in MODES:
        raise ValueError(message("ablated", f"a mode among {', '.join(MODES)}", repr(mode), "zero is usual"))
    if not phases or not set(phases) <= set(PHASES):
        raise ValueError(message("ablated", "phases among prefill, decode", repr(phases), "Name one or both"))
    if window < 1:
        raise ValueError(message("ablated", "a window of at least 1 token", f"{window}", "64 is usual"))
    if mode == "mean" and not set(heads) <= (means or {}).keys():
        raise ValueError(message("ablated", "means of all heads that are ablated", "too few", "Call mean_outputs"))
    with tapped(model, _Ablation(frozenset(heads), mode, frozenset(phases), window, means or {})):
        yield


def check(heads: Collection[Head], q_heads: list[int]) -> None:
    """Refuse heads that a model does not have.

    Args:
        heads: (layer, query head).
        q_heads: query heads of each layer.

    Raises:
        ValueError: names the first.
    """
    for layer, head in sorted(heads):
        if not (0 <= layer < len(q_heads) and 0 <= head < q_heads[layer]):
            shape = f"a head of the model ({len(q_heads)} layers of {max(q_heads)} query heads)"
            raise ValueError(message("heads", shape, f"{layer}-{head}", "Use the scores of this very model"))


@torch.no_grad()
def mean_outputs(model: PreTrainedModel, ids: Tensor) -> dict[Head, Tensor]:
    """Mean output of every query head over the tokens of a text, `[Dv]`, float32.

    Args:
        model: patched with a method that reads everything.
        ids: `[T]`, int64.

    Raises:
        ValueError: the model is not patched.
    """
    found: dict[Head, Tensor] = {}

    def note(read: Read) -> Tensor:
        found.update({(read.layer, h): read.out[0, i].float().mean(0) for i, h in enumerate(read.q_heads)})
        return read.out

    with tapped(model, note):
        model(input_ids=ids[None].to(model.device), use_cache=False, logits_to_keep=1)
    return found


@dataclass(frozen=True)
class _Ablation:
    """The tap."""

    heads: frozenset[Head]
    mode: str
    phases: frozenset[str]
    window: int
    means: Mapping[Head, Tensor]

    def __call__(self, read: Read) -> Tensor:
        """What the group says instead."""
        mine = [i for i, head in enumerate(read.q_heads) if (read.layer, head) in self.heads]
        if not mine:
            return read.out
        index = torch.tensor(mine, device=read.out.device)
        instead = self._instead(read, mine, index).to(read.out.dtype)
        writes = read.step.pos == read.step.lengths_after[:, None] - 1
        here = (writes & ("decode" in self.phases)) | (~writes & ("prefill" in self.phases))
        return read.out.index_copy(1, index, torch.where(here[:, None, :, None], instead, read.out[:, index]))

    def _instead(self, read: Read, mine: list[int], index: Tensor) -> Tensor:
        """`[B, n, T, Dv]` for some heads, by their places in the group."""
        if self.mode == "zero":
            return torch.zeros_like(read.out[:, index])
        if self.mode == "mean":
            rows = [self.means[read.layer, read.q_heads[i]] for i in mine]
            return torch.stack(rows).to(read.out.device)[None, :, None].expand_as(read.out[:, index])
        kv = index // (read.q.shape[1] // read.k.shape[1])
        q, k, v = read.q[:, index], read.k[:, kv], read.v[:, kv]
        attend = ops.attend_pages if read.step.tokens == 1 and read.step.columns > 0 else ops.attend_blocks
        if self.mode == "uniform":
            return attend(torch.zeros_like(q), k, v, ops.Logits(1.0), read.see, None)
        window = self.window if read.see.window is None else min(self.window, read.see.window)
        return attend(q, k, v, read.logits.heads(index), replace(read.see, sink=0, window=window), None)
