"""A choice of blocks that holds for some decode steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .rows import picked


class Kept:
    """What a group of heads chose last in decode, where it chooses every few steps only.

    Attributes:
        since: columns of the batch when it was chosen; None: nothing since the last prompt, crop or reset.
    """

    def __init__(self) -> None:
        self.since: int | None = None
        self._ids: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """`[B, Hs, 1, K]`, int32, as in `ops.Selection`; there must be a choice."""
        assert self._ids is not None and self.since is not None
        return self._ids

    def forget(self) -> None:
        """The next decode step chooses anew."""
        self.since = None

    def is_due(self, every: int, columns: int) -> bool:
        """True if the decode step after `columns` columns has to choose."""
        return self.since is None or columns - self.since >= every

    def put(self, ids: Tensor, columns: int) -> None:
        """Hold a choice, in the same memory where it has the size of the one before."""
        self.room(ids.shape, ids.device).copy_(ids)
        self.since = columns

    def room(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Where a choice goes, int32: whoever writes one there sets `since`, too."""
        if self._ids is None or self._ids.shape != shape or self._ids.device != device:
            self._ids = torch.empty(shape, dtype=torch.int32, device=device)
        return self._ids

    def buffers(self) -> list[Tensor | None]:
        """The live tensors."""
        return [self._ids]

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`."""
        if self._ids is not None:
            self._ids = picked(self._ids, pick)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers that `restore` needs."""
        return ({} if self._ids is None or self.since is None else {"ids": self._ids}), {"since": self.since}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Become what `state` told of."""
        self._ids, self.since = tensors.get("ids"), values["since"]
