"""Which past blocks a patched model read while it wrote: citations, as spans of tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from .kernels.types import Selection
from .patch import state_of
from .plan import HeadGroup, Selector
from .select.choose import forced


@dataclass(frozen=True)
class Span:
    """A block of the text that was chosen, and by how many heads.

    Attributes:
        start: first token of the block, by its place in the row's text.
        stop: one past its last token.
        share: of all heads that had a choice, over all layers and queries asked for, 0 to 1.
    """

    start: int
    stop: int
    share: float


@dataclass(frozen=True)
class _Seen:
    """What one group of heads chose in one call."""

    block: int
    last: Tensor  # [B or 1, N], last query of each block of queries, -1 for none
    chosen: Tensor  # [B, Hs, N, K], -1 for none and for blocks that were forced


@dataclass(eq=False)
class Trace:
    """What was read, for as long as the block of `trace(model)` runs."""

    _seen: list[_Seen] = field(default_factory=list)

    def watch(self, layer: int, group: HeadGroup, selector: Selector, q_pos: Tensor, read: Selection) -> None:
        """Take down one choice."""
        low, _ = forced(selector, q_pos, read.q_block)
        pos = q_pos.view(q_pos.shape[0], -1, read.q_block)
        free = (read.ids >= selector.sink_blocks) & (read.ids < low[:, None, :, None])
        self._seen.append(_Seen(selector.block, pos.amax(-1), read.ids.masked_fill(~free, -1)))

    def spans(self, start: int = 0, stop: int | None = None, row: int = 0) -> list[Span]:
        """The blocks that the queries at positions `start` to `stop - 1` chose, most read first.

        A block of queries counts if its last query is among them: a prompt's last query writes the first new token.
        Blocks that are read in any case, sinks and the neighbourhood, are left out.

        Args:
            start: first position, such as the length of the prompt less one.
            stop: one past the last; None: to the end.
            row: of the batch.
        """
        votes: Counter[tuple[int, int]] = Counter()
        asked = 0
        for seen in self._seen:
            last = seen.last[min(row, seen.last.shape[0] - 1)].cpu()
            inside = (last >= start) & (last >= 0) & (last < (2**62 if stop is None else stop))
            chosen = seen.chosen[row].cpu()[:, inside]
            asked += chosen.shape[0] * chosen.shape[1]
            for block, count in Counter(chosen[chosen >= 0].tolist()).items():
                votes[block * seen.block, (block + 1) * seen.block] += count
        ranked = sorted(votes.items(), key=lambda item: (-item[1], item[0]))
        return [Span(first, end, count / asked) for (first, end), count in ranked]


@contextmanager
def trace(model: PreTrainedModel) -> Iterator[Trace]:
    """Note which blocks of the text are read inside the block; `trace.spans()` then tells.

    Args:
        model: patched with a method that chooses blocks (quest, lserve, inf_llm, xattention).

    Raises:
        ValueError: the model is not patched, or its plan reads everything.
    """
    state = state_of(model)
    policies = [] if state is None else [g.policy for layer in state.plan.layers for g in layer.groups]
    if state is None or not any(p.prefill or p.decode for p in policies):
        raise ValueError(
            "trace: expected a model patched with a method that chooses blocks; got "
            f"{'an unpatched one' if state is None else repr(state.plan.method)}. Patch with 'quest' or 'inf_llm'."
        )
    found = Trace()
    before, state.watch = state.watch, found.watch
    try:
        yield found
    finally:
        state.watch = before
