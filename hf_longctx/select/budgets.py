"""How many of the scored blocks are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..plan import primitive, require_whole


@primitive
@dataclass(frozen=True)
class TopK:
    """The best blocks, so many that they hold `tokens` tokens; of equal scores the first. All, where there are fewer.

    Args:
        tokens: beside the forced blocks; a whole number of blocks.

    Raises:
        ValueError: no whole number, or a negative one.
    """

    tokens: int

    def __post_init__(self) -> None:
        require_whole("TopK", 0, tokens=self.tokens)

    @property
    def shares(self) -> None:
        """The number is fixed."""
        return None

    def describe(self) -> str:
        """One phrase for a table."""
        return f"the best {self.tokens} tokens"


@primitive
@dataclass(frozen=True)
class Mass:
    """The best blocks, so many that they and the forced ones hold a share `tau` of the scored attention.

    Paper: XAttention (arXiv:2503.16428) §2.2. At tau = 1 everything is read.

    Args:
        tau: the share, in (0, 1]; one for all heads, or one for each head of the group (query heads where each selects
            for itself, else KV heads).

    Raises:
        ValueError: a share outside (0, 1].
    """

    tau: float | tuple[float, ...] = 0.9

    def __post_init__(self) -> None:
        if isinstance(self.tau, Sequence):
            object.__setattr__(self, "tau", tuple(float(t) for t in self.tau))
        for tau in self.shares:
            if not 0 < tau <= 1:
                raise ValueError(f"Mass: expected tau in (0, 1]; got {tau}. 0.9 is usual; 1 reads everything.")

    @property
    def tokens(self) -> int | None:
        """It depends on the scores."""
        return None

    @property
    def shares(self) -> tuple[float, ...]:
        """One share, or one per head."""
        return self.tau if isinstance(self.tau, tuple) else (self.tau,)

    def describe(self) -> str:
        """One phrase for a table."""
        low, high = min(self.shares), max(self.shares)
        return f"{low:.0%} of attention" if low == high else f"{low:.0%} to {high:.0%} of attention"
