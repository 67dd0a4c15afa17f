"""A choice of blocks that holds for some decode steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Kept:
    """What a group of heads chose last in decode, where it chooses every few steps only.

    Attributes:
        ids: `[B, Hs, 1, K]`, int32, as in `ops.Selection`; None: nothing since the last prompt, crop or reset.
        age: decode steps since it was chosen.
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.age = 0

    def forget(self) -> None:
        """The next decode step chooses anew."""
        self.ids = None

    def is_due(self, every: int) -> bool:
        """Count a decode step; True if it has to choose."""
        self.age = 0 if self.ids is None else (self.age + 1) % every
        return self.age == 0

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`."""
        if self.ids is not None:
            self.ids = self.ids.index_select(0, pick.to(self.ids.device))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers that `restore` needs."""
        return ({} if self.ids is None else {"ids": self.ids}), {"age": self.age}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Become what `state` told of."""
        self.ids, self.age = tensors.get("ids"), values["age"]
