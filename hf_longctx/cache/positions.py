"""At which position a stored key is read: its place in the text, or its place in the cache.

In-cache positions without re-rotation. StreamingLLM counts distance over what is stored, so evicting a token would
move every key. But only the sinks change their distance to the query; inside the window, distance in the cache is
distance in the text. A key is therefore rotated once, at its *lap position* (`lap_position`), which stays small however
long the stream gets, and queries are turned instead: not at all for keys of their own lap, by one lap for keys of the
lap before, and to `sink_position` for the sinks. Nothing is re-rotated, so no error accumulates, and any chunking of
the input agrees.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..plan import primitive


@primitive
@dataclass(frozen=True)
class Absolute:
    """Keys are read at their place in the text, rotated by the model itself."""

    @property
    def in_cache(self) -> bool:
        """Distance is counted over the text."""
        return False

    @property
    def distance(self) -> int | None:
        """No bound."""
        return None

    @property
    def at_read(self) -> bool:
        """Keys are stored as they will be read."""
        return False

    def describe(self) -> str:
        """One phrase for a table."""
        return "positions of the text"


@primitive
@dataclass(frozen=True)
class InCache:
    """Keys are read at their place among what the query sees: sinks first, then the window, without a gap.

    Paper: StreamingLLM (arXiv:2309.17453) §3.2.
    """

    @property
    def in_cache(self) -> bool:
        """Distance is counted over what is stored."""
        return True

    @property
    def distance(self) -> int | None:
        """Bounded by what is stored."""
        return None

    @property
    def at_read(self) -> bool:
        """Keys are stored as they will be read."""
        return False

    def describe(self) -> str:
        """One phrase for a table."""
        return "positions in the cache"


@primitive
@dataclass(frozen=True)
class Clamped:
    """Keys are read at their distance in the text, those further away than `distance` at just that.

    Paper: InfLLM (arXiv:2402.04617) §3.2, whose far keys all stand at the edge of the local window.

    Args:
        distance: the largest distance at which a key is read, in tokens.

    Raises:
        ValueError: a distance below one.
    """

    distance: int

    def __post_init__(self) -> None:
        if type(self.distance) is not int or self.distance < 1:
            raise ValueError(
                f"Clamped: expected distance as a whole number of tokens >= 1; got {self.distance!r}. "
                "Use the local window minus one."
            )

    @property
    def in_cache(self) -> bool:
        """Distance is counted over the text."""
        return False

    @property
    def at_read(self) -> bool:
        """Keys are stored as they will be read."""
        return False

    def describe(self) -> str:
        """One phrase for a table."""
        return f"positions of the text, at most {self.distance} apart"


@primitive
@dataclass(frozen=True)
class Contiguous:
    """Keys are read where they would stand if the kept tokens were all there ever was.

    Keys are stored un-rotated, so whole spans can go from anywhere, and what is left moves up (`cache/angles.py`).
    Positions may have three numbers (time, height, width).

    Paper: StreamingVLM (arXiv:2510.09608) §3.1, contiguous RoPE.
    """

    @property
    def in_cache(self) -> bool:
        """Distance is that of the positions, which the cache holds; queries are not turned."""
        return False

    @property
    def distance(self) -> int | None:
        """No bound."""
        return None

    @property
    def at_read(self) -> bool:
        """Keys are rotated whenever they are read."""
        return True

    def describe(self) -> str:
        """One phrase for a table."""
        return "positions made contiguous at read"


def lap_position(pos: Tensor, offset: int, lap: int) -> Tensor:
    """The small position at which a token is rotated.

    Args:
        pos: `[...]`, int64, index of the token in its row; negative for padding.
        offset: tokens before the first lap starts (the plan's sinks).
        lap: tokens in a lap, at least the widest window.

    Returns:
        `[...]`, int64, `pos` minus a whole number of laps, below `offset + lap`.
    """
    return pos - lap * ((pos - offset).clamp(min=0) // lap)


def sink_position(pos: Tensor, sink: int, reach: int, floor: Tensor | None) -> Tensor:
    """The position from which a query sees the sinks: its own place among the keys that it sees.

    Args:
        pos: `[B or 1, T]`, int64, index of the query in its row.
        sink: sinks of the head.
        reach: window of the head in this call.
        floor: `[B, 1]`, int64, oldest token outside the sinks that was not evicted by hand, or None.

    Returns:
        `[B or 1, T]`, int64, at most `sink + reach - 1`.
    """
    first = (pos - (reach - 1)).clamp(min=sink)
    if floor is not None:
        first = torch.maximum(first, floor)
    return torch.where(pos < sink, pos, sink + pos - first)
