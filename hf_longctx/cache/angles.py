"""Where the stored tokens stand, and how their keys are rotated when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .rows import PAGE, Rows, Stored, decoded, loaded, part, room, saved
from .step import Step

Rotate = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From positions `[B, T]` or `[P, B, T]` to cosines and sines `[B, T, R]`: the model's own routine."""


class Angles:
    """Positions of the stored tokens, with one number or three, and their cosines and sines; shared by all layers.

    A call adds those of its tokens, and only when spans have gone are those behind them made anew.
    """

    def __init__(self) -> None:
        self._pos, self._cos, self._sin = (Rows(None) for _ in range(3))
        self._flat = False

    @property
    def nbytes(self) -> int:
        """Bytes of the live tensors."""
        return sum(rows.nbytes for rows in self._all)

    @property
    def positions(self) -> Tensor:
        """`[P, B, slots]`, int64: where tokens stand; P is 1 or 3."""
        pos: Any = self._pos.filled
        flat: Tensor = pos[..., 0].transpose(0, 1)
        return flat

    def buffers(self) -> list[Stored | None]:
        """The live tensors."""
        return [rows.data for rows in self._all]

    def put(self, pos: Tensor, cos: Tensor, sin: Tensor, step: Step) -> None:
        """Take in the tokens of a call.

        Args:
            pos: `[B, T]` or `[P, B, T]`, each row's real tokens first, as all three.
            cos: `[B, T, R]`.
            sin: likewise.
            step: the call.
        """
        self._flat = pos.ndim == 2
        pos = (pos[None] if self._flat else pos).transpose(0, 1)[..., None]
        for rows, x in ((self._pos, pos), (self._cos, cos[:, None]), (self._sin, sin[:, None])):
            rows.reserve(x, room(rows.slots, step.width, PAGE))
            rows.put(x, step, 0, None)

    def view(self, slots: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the first slots: `[B, slots, R]`."""
        cos, sin = (decoded(part(rows.filled, slice(None), 0, slots))[:, 0] for rows in (self._cos, self._sin))
        return cos, sin

    def keep(self, index: Tensor, shift: Tensor, rotate: Rotate) -> None:
        """Let go of all tokens but those named, and let these stand elsewhere.

        Args:
            index: `[B, N]`, int64, slots that are kept.
            shift: `[B, N]`, int64, by how much each moves up.
            rotate: the model's own routine.
        """
        for rows in self._all:
            rows.move_up(index)
        moved = self.positions[..., : index.shape[1]] - shift
        self._pos.write(moved.transpose(0, 1)[..., None], 0)
        for rows, x in zip((self._cos, self._sin), rotate(moved[0] if self._flat else moved), strict=True):
            rows.write(x[:, None], 0)

    def prepare(self, step: Step) -> None:
        """Make room for a call."""
        for rows in self._all:
            if rows.data is not None:
                rows.reserve(rows.data, room(rows.slots, step.width, PAGE))

    def map_rows(self, pick: Tensor) -> None:
        """Replace the batch rows by `rows[pick]`."""
        for rows in self._all:
            rows.map_rows(pick)

    def state(self, columns: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers that `restore` needs, after `columns` columns."""
        tensors: dict[str, Tensor] = {}
        values: dict[str, Any] = {"flat": self._flat, "slots": self._cos.slots}
        for name, rows in zip(("pos", "cos", "sin"), self._all, strict=True):
            more, said = saved(part(rows.filled, slice(None), 0, columns), name)
            tensors, values = {**tensors, **more}, {**values, **said}
        return tensors, values

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Become what `state` told of."""
        self._flat = values["flat"]
        for name, rows in zip(("pos", "cos", "sin"), self._all, strict=True):
            stored = loaded(tensors, values, name)
            rows.reserve(stored, values["slots"])
            rows.write(stored, 0)

    @property
    def _all(self) -> tuple[Rows, Rows, Rows]:
        return self._pos, self._cos, self._sin
