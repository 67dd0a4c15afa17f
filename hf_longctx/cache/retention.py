"""What stays stored: everything, or the sinks and the last window. Pure values; the store carries them out."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import primitive


@primitive
@dataclass(frozen=True)
class KeepAll:
    """Every token stays."""

    @property
    def sink(self) -> int:
        """No token is special."""
        return 0

    @property
    def window(self) -> int | None:
        """Unbounded."""
        return None

    def reach(self, prompt: bool) -> int | None:
        """A query sees all that came before."""
        return None

    def describe(self) -> str:
        """One phrase for a table."""
        return "keep all"


@primitive
@dataclass(frozen=True)
class SinkWindow:
    """The first `sink` tokens of each row and its last `window` tokens, the newest included.

    Paper: StreamingLLM (arXiv:2309.17453) §3.2; the streaming heads of DuoAttention (arXiv:2410.10819) §2.

    Args:
        sink: first real tokens of a row, never evicted; padding is no token.
        window: last tokens that stay.
        prefill_window: if given, the window that queries see in prefill calls (LServe's wider prefill); it is held
            until the first decode call.

    Raises:
        ValueError: a negative sink, or a window below one.
    """

    sink: int
    window: int
    prefill_window: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("sink", self.sink, 0),
            ("window", self.window, 1),
            ("prefill_window", self.window if self.prefill_window is None else self.prefill_window, self.window),
        ):
            if type(value) is not int or value < least:
                raise ValueError(
                    f"SinkWindow: expected {name} as a whole number of tokens >= {least}; got {value!r}. "
                    f"Give {name}={max(least, 1)} or more."
                )

    def reach(self, prompt: bool) -> int | None:
        """The prefill window, where there is one, for prefill calls; else the window."""
        return self.prefill_window if prompt and self.prefill_window is not None else self.window

    def describe(self) -> str:
        """One phrase for a table."""
        wide = "" if self.prefill_window is None else f" (prefill {self.prefill_window})"
        return f"keep {f'{self.sink} sinks + ' if self.sink else ''}window {self.window}{wide}"
