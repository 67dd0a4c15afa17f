"""A cache as a list of tokens per row, and a comparison of what a store shows with what it should."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_longctx.cache.rows import View
from hf_longctx.cache.step import Step
from hf_longctx.cache.store import Store
from hf_longctx.kernels import ops
from hf_longctx.plan import Retention


class Rows:
    """Rows of tokens; a token is a number that is given once."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.given = 0

    def extend(self, real: Tensor) -> Tensor:
        """Append a token wherever `real` `[B, T]` is true; gives `[B, T]`, the tokens, 0 for padding."""
        self.tokens = self.tokens or [[] for _ in range(len(real))]
        out = torch.zeros(real.shape)
        for row, columns in enumerate(real.tolist()):
            for column, is_real in enumerate(columns):
                if is_real:
                    self.given += 1
                    self.tokens[row].append(self.given)
                    out[row, column] = self.given
        return out

    def seen(self, row: int, pos: int, sink: int, window: int | None) -> list[tuple[int, int]]:
        """Position and token of all that the query at `pos` sees."""
        known = list(enumerate(self.tokens[row]))[: pos + 1]
        return [(p, t) for p, t in known if p < sink or window is None or pos - p < window]


def append(store: Store, tokens: Tensor, step: Step) -> View:
    """Store tokens `[B, T]` as keys of two heads and three channels, values of one channel."""
    k = tokens[:, None, :, None] * torch.tensor([1.0, 2.0])[:, None, None].expand(-1, 1, 3)
    v = -k[..., :1]
    if step.order is not None:
        k, v = ops.take_tokens(k, step.order), ops.take_tokens(v, step.order)
    return store.append(k, v, step)


def assert_shows(view: View, rows: Rows, step: Step, retention: Retention) -> None:
    """Every query finds every token that it sees, at its position, once, and no other."""
    size, window = len(rows.tokens), retention.reach(not step.decodes)
    columns = torch.arange(view.k.shape[2])[None] if view.k_pos is None else view.k_pos
    places = columns.expand(size, -1).tolist()
    for row, queries in enumerate(step.pos.expand(size, -1).tolist()):
        for pos in (p for p in queries if p >= 0):
            found = [
                (place, column)
                for column, place in enumerate(places[row])
                if 0 <= place <= pos and (place < retention.sink or window is None or pos - place < window)
            ]
            for head, factor in ((0, 1), (1, 2)):
                keys = sorted((place, int(view.k[row, head, column, 1]) // factor) for place, column in found)
                values = sorted((place, int(-view.v[row, head, column, 0]) // factor) for place, column in found)
                assert keys == values == rows.seen(row, pos, retention.sink, window)


def mask_of(reals: Sequence[Tensor]) -> Tensor:
    """The attention mask of all calls so far."""
    return torch.cat(list(reals), 1).long()
