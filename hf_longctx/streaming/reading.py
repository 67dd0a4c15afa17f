"""Calls of a vision-language model on a session's cache: where tokens stand, and what the last one makes of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache.cache import LongContextCache
from ..models import CACHE, VisionFacts
from .chat import Encoded
from .layout import Row
from .tower import Tower


class Reader:
    """A model that reads tokens of several streams, each in a row of the cache.

    Args:
        model: the patched vision-language model.
        cache: of its plan.
        facts: how it counts positions.
        recorded: whether calls are recorded now.

    Attributes:
        device: that its tokens go to.
        like: of the dtype that its text side computes in.
    """

    def __init__(self, model: Any, cache: LongContextCache, facts: VisionFacts, recorded: Callable[[], bool]) -> None:
        self.model, self.cache, self.axes = model, cache, facts.axes
        self.tower = Tower(model, recorded)
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.like = torch.empty(0, dtype=model.get_decoder().dtype, device=self.device)

    def places(
        self, rows: Sequence[Row], ids: Sequence[list[int]], kinds: Sequence[list[int]] | None, encoded: Encoded
    ) -> list[Tensor]:
        """Where the tokens of each row stand, `[axes, T']`: what the model's routine says of them alone, moved on."""
        if self.axes == 1 or kinds is None:
            return [(row.next + torch.arange(len(x))).expand(self.axes, -1) for row, x in zip(rows, ids, strict=True)]
        width = max(map(len, ids))
        routine = self.model.model.get_rope_index
        known = inspect.signature(routine).parameters
        grids = {name: x for name, x in encoded.vision.items() if name in known}
        some = [i for i, row in enumerate(ids) if row]
        pos, _ = routine(
            input_ids=_left([ids[i] for i in some], width),
            mm_token_type_ids=_left([kinds[i] for i in some], width).int(),
            attention_mask=_left([[1] * len(ids[i]) for i in some], width),
            **grids,
        )
        made = {i: rows[i].next + pos[:, at, width - len(ids[i]) :] for at, i in enumerate(some)}
        return [made.get(i, pos[:, 0, :0]) for i in range(len(ids))]

    def read(self, rows: Sequence[Row], ids: Sequence[list[int]], places: Sequence[Tensor], encoded: Encoded) -> Tensor:
        """Read tokens and pictures: `[B, V]`, logits of the last token of each row.

        Args:
            rows: which know already what is read.
            ids: tokens of each row.
            places: as the function of that name gives them.
            encoded: with what the vision tower reads.
        """
        width = max(map(len, ids))
        pos = torch.zeros(self.axes, len(ids), width, dtype=torch.int64)
        for number, place in enumerate(places):
            pos[:, number, width - place.shape[1] :] = place
        vision = {name: self._moved(x) for name, x in encoded.vision.items() if name != "second_per_grid_ts"}
        with self.tower.recorded():
            return self.forward(rows, _left(ids, width), pos, [len(row) for row in ids], **vision)

    def step(self, rows: Sequence[Row], tokens: Tensor, pos: Tensor, running: Sequence[bool]) -> Tensor:
        """Read one token of each row that is not done: `[B, V]`.

        Args:
            rows: which know already of it.
            tokens: `[B]`.
            pos: `[B]`, where they stand.
            running: which rows are not done.
        """
        return self.forward(rows, tokens[:, None], pos.view(1, -1, 1).expand(self.axes, -1, 1), list(map(int, running)))

    def forward(self, rows: Sequence[Row], ids: Tensor, pos: Tensor, counts: Sequence[int], **vision: Any) -> Tensor:
        """One call: `[B, V]`, logits of the last column.

        Args:
            rows: which know already what is read.
            ids: `[B, T]`, right-aligned.
            pos: `[axes, B, T]`, likewise.
            counts: how many of them each row has.
            **vision: what the vision tower reads.
        """
        width, mask = ids.shape[1], None
        if len(rows) > 1:
            new = torch.tensor(counts)
            before = torch.tensor([row.tokens for row in rows]) - new
            real = torch.arange(width) >= width - new[:, None]
            mask = torch.cat((torch.arange(self.cache.ledger.columns) < before[:, None], real), 1).to(self.device)
        out = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask,
            position_ids=(pos if self.axes == 3 else pos[0]).to(self.device),
            **{CACHE: self.cache},
            use_cache=True,
            logits_to_keep=1,
            **vision,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def _moved(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(self.device, self.like.dtype if x.is_floating_point() else x.dtype)


def _left(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """`[B, width]`, int64: rows right-aligned, with zeros before."""
    return torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
