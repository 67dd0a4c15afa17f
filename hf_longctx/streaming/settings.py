"""What a session does in a round, apart from what it keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass

QUERY = "Comment on what happens."
"""What a session asks for if nobody says."""

TIME = "Time={:.1f}-{:.1f}s"
"""The words of a round: where in the stream its pictures stand, as the paper's training data has them."""


@dataclass(frozen=True)
class Settings:
    """Arguments of `Session` of the same names.

    Raises:
        ValueError: a size that is none.
    """

    query: str = QUERY
    system: str | None = None
    round_s: float = 1.0
    max_new_tokens: int = 20
    round_budget_s: float | None = None
    seed: int = 0
    streams: int = 1

    def __post_init__(self) -> None:
        budget = 1.0 if self.round_budget_s is None else self.round_budget_s
        lengths: tuple[tuple[str, object], ...] = (("round_s", self.round_s), ("round_budget_s", budget))
        for name, value in lengths:
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ValueError(
                    f"stream.Session: expected {name} as seconds > 0; got {value!r}. The paper's rounds have 1 s."
                )
        for name, count in (("max_new_tokens", self.max_new_tokens), ("streams", self.streams)):
            if type(count) is not int or count < 1:
                raise ValueError(
                    f"stream.Session: expected {name} as a whole number >= 1; got {count!r}. Give {name}=1 or more."
                )
        query: object = self.query
        if not isinstance(query, str) or not query.strip():
            raise ValueError(
                f"stream.Session: expected query as words; got {self.query!r}. Leave it out for '{QUERY}'."
            )

    def check_window(self, window_s: float) -> None:
        """Refuse a window that does not hold a round."""
        if window_s < self.round_s:
            raise ValueError(
                f"stream.Session: expected window_s to hold a round of {self.round_s:g} s; got {window_s:g}. "
                f"Give window_s={self.round_s:g} or more, or shorter rounds."
            )
