"""What a session says: one event for each round and each answer."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Event:
    """A text that the model gave, and the stretch of the stream that it is about.

    Args:
        t: start of the round in seconds of the stream; of an answer, when it was asked.
        t_end: end of the round, likewise.
        text: what was generated, without special tokens; empty for silence.
        kind: `caption` for a round of frames, `answer` for a question.
        stream: number of the stream, where a session has several.
        round: number of the round in its stream; of an answer, of the round before it.
        frames: frames that went in.
        tokens: tokens that came out.
        latency_s: seconds from the frames to the last token, on the clock of the machine.
        stopped: `end` if the model ended its turn, `tokens` or `time` where that budget did.
    """

    t: float
    t_end: float
    text: str
    kind: Literal["caption", "answer"] = "caption"
    stream: int = 0
    round: int = 0
    frames: int = 0
    tokens: int = 0
    latency_s: float = 0.0
    stopped: Literal["end", "tokens", "time"] = "end"

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, as JSON can hold them."""
        return asdict(self)
