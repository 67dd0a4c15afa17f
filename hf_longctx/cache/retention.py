"""What stays stored: everything, the sinks and the last window, or text and pictures by windows of their own.

Pure values; the store carries them out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..plan import primitive
from .spans import Span


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


@primitive
@dataclass(frozen=True)
class ModalityWindow:
    """The first and the last tokens of text, and the pictures of the last seconds, each in whole spans.

    Between two calls all that is stored is seen. What goes is named by `keep`, and `LongContextCache.keep` lets it go.

    Paper: StreamingVLM (arXiv:2510.09608) §3.1: text sink, text window, visual window. Differs: whole spans, so that no
    turn is ever cut, and pinned text, which is paid for out of the sink.

    Args:
        text_sink: first tokens of text that stay, pinned ones included.
        text_window: last tokens of text that stay.
        vision_seconds: how long pictures stay, in seconds of the stream.
        vision_tokens: most tokens of pictures, whatever their size and rate; None: no bound of its own.

    Raises:
        ValueError: a size that is none.
    """

    text_sink: int = 512
    text_window: int = 512
    vision_seconds: float = 16.0
    vision_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("text_sink", self.text_sink), ("text_window", self.text_window)):
            if type(value) is not int or value < 1:
                raise ValueError(
                    f"ModalityWindow: expected {name} as a whole number of tokens >= 1; got {value!r}. "
                    "The paper has 512."
                )
        if self.vision_tokens is not None and (type(self.vision_tokens) is not int or self.vision_tokens < 1):
            raise ValueError(
                f"ModalityWindow: expected vision_tokens as a whole number >= 1 or None; got {self.vision_tokens!r}. "
                "Leave it out."
            )
        seconds: object = self.vision_seconds
        if not (isinstance(seconds, int | float) and 0 < seconds < math.inf):
            raise ValueError(
                f"ModalityWindow: expected vision_seconds as a number > 0; got {self.vision_seconds!r}. "
                "The paper has 16."
            )

    @property
    def sink(self) -> int:
        """No token is special by its place alone."""
        return 0

    @property
    def window(self) -> int | None:
        """What is stored is seen."""
        return None

    def reach(self, prompt: bool) -> int | None:
        """A query sees all that is stored."""
        return None

    def keep(self, spans: Sequence[Span]) -> tuple[bool, ...]:
        """Which spans of a row stay.

        A span that goes never comes back: the sinks are the first spans without a gap, so none that came later slips in
        among them. The newest of each kind stays whatever its size.

        Args:
            spans: in their order, of all that is stored and what is about to be.
        """
        stays = [span.pinned for span in spans]
        room = self.text_sink - sum(span.tokens for span in spans if span.pinned)
        text = [i for i, span in enumerate(spans) if span.kind == "text" and not span.pinned]
        for number, i in enumerate(text):
            if spans[i].number != number or spans[i].tokens > room:
                break
            room, stays[i] = room - spans[i].tokens, True
        _from_the_end(spans, text, self.text_window, stays)
        seen = [i for i, span in enumerate(spans) if span.kind == "vision"]
        if seen:
            newest = max(spans[i].t for i in seen)
            recent = [i for i in seen if spans[i].t > newest - self.vision_seconds + 1e-6]
            _from_the_end(spans, recent, math.inf if self.vision_tokens is None else self.vision_tokens, stays)
        return tuple(stays)

    def describe(self) -> str:
        """One phrase for a table."""
        cap = "" if self.vision_tokens is None else f", at most {self.vision_tokens} tokens"
        return f"keep text {self.text_sink} + {self.text_window}, pictures of {self.vision_seconds:g} s{cap}"


def _from_the_end(spans: Sequence[Span], which: list[int], room: float, stays: list[bool]) -> None:
    """Mark the last of some spans, as many as there is room for, and the very last in any case."""
    for i in reversed(which):
        room -= spans[i].tokens
        if stays[i] or (room < 0 and i != which[-1]):
            break
        stays[i] = True
