"""StreamingVLM: endless video in bounded memory, text and pictures each in a window of their own."""

from __future__ import annotations

from dataclasses import dataclass

from ..cache.positions import Contiguous
from ..cache.retention import ModalityWindow
from ..errors import UnsupportedError
from ..models import VISION, ModelFacts
from ..plan import HeadPolicy, Plan
from .layouts import uniform


@dataclass(frozen=True)
class StreamingVLM:
    """Pictures of the last seconds, the first and the last text, at positions as if nothing else had ever been.

    What goes is decided between two calls, by `lc.stream.Session`; without one nothing goes, and the model is dense.

    Paper: StreamingVLM (arXiv:2510.09608) §3.1. Differs: whole turns go, with the words around their pictures; what
    stays is not reordered; questions can be pinned.

    Args:
        window_s: how long pictures stay, in seconds of the stream.
        text_sink: first tokens of text that stay, pinned ones included.
        text_window: last tokens of text that stay.
        vision_tokens: most tokens of pictures, whatever their size and rate; None: no bound of its own.
    """

    window_s: float = 16.0
    text_sink: int = 512
    text_window: int = 512
    vision_tokens: int | None = None

    def __post_init__(self) -> None:
        self.retention  # noqa: B018 - sizes that are none are refused here

    @property
    def retention(self) -> ModalityWindow:
        """What stays."""
        return ModalityWindow(self.text_sink, self.text_window, self.window_s, self.vision_tokens)

    def plan(self, facts: ModelFacts) -> Plan:
        """The plan for a model.

        Raises:
            UnsupportedError: no vision-language model of a known family, or its attention or positions do not allow it.
        """
        if facts.vision is None:
            raise UnsupportedError(
                f"streaming_vlm: expected a vision-language model ({', '.join(VISION)}); got a model with the text "
                f"decoder '{facts.family}' that is none of them. Use 'streaming_llm' for text."
            )
        windows = [layer.window for layer in facts.layers if layer.window is not None]
        if windows:
            raise UnsupportedError(
                f"streaming_vlm: expected full attention in all layers; got '{facts.vision.family}' with a sliding "
                f"window of {windows[0]} in {len(windows)} of them. Turn it off in the configuration."
            )
        if facts.not_in_cache or facts.longest_in_cache is not None:
            reason = facts.not_in_cache or "its rotary frequencies follow the length of the text"
            raise UnsupportedError(
                f"streaming_vlm: expected rotary positions with constant frequencies; got '{facts.vision.family}': "
                f"{reason}. Load it with another rotary type."
            )
        return uniform("streaming_vlm", facts, HeadPolicy(self.retention, Contiguous()))
