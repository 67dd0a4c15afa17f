"""Time-stamped texts read back: SRT, WebVTT, and JSONL as a session writes it."""

from __future__ import annotations

import html
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

_ARROW = re.compile(r"((?:\d+:)?\d+:\d+[.,]\d+)\s+-->\s+((?:\d+:)?\d+:\d+[.,]\d+)")


@dataclass(frozen=True)
class Cue:
    """A text and its stretch of the stream, in seconds."""

    start: float
    end: float
    text: str


def read(path: str | os.PathLike[str]) -> list[Cue]:
    """The captions of a file, by start.

    Args:
        path: `.srt`, `.vtt`, or `.jsonl` with `t`, `t_end` and `text` in each line (other fields are ignored).

    Returns:
        Captions with a text; silence is left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, not UTF-8, or a line that is no caption.
    """
    source = Path(path).expanduser()
    if not source.is_file():
        raise FileNotFoundError(f"captions: expected a .srt, .vtt or .jsonl file; got {source}, which is none.")
    if source.suffix.lower() not in (".srt", ".vtt", ".jsonl"):
        raise ValueError(f"captions: expected a .srt, .vtt or .jsonl file; got {source.name}. Convert it first.")
    try:
        text = source.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"captions: expected UTF-8 in {source}; got {error.reason}. Convert it first.") from error
    cues = _jsonl(text, source) if source.suffix.lower() == ".jsonl" else _cues(text, source)
    return sorted((cue for cue in cues if cue.text), key=lambda cue: (cue.start, cue.end))


def _jsonl(text: str, source: Path) -> list[Cue]:
    cues = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            cue = Cue(float(found["t"]), float(found["t_end"]), str(found["text"]).strip())
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"captions: expected an object with t, t_end and text in line {number} of {source}; got {line[:80]!r}."
            ) from error
        if not (math.isfinite(cue.start) and math.isfinite(cue.end)):
            raise ValueError(f"captions: expected finite times in line {number} of {source}; got {line[:80]!r}.")
        cues.append(cue)
    return cues


def _cues(text: str, source: Path) -> list[Cue]:
    """Blocks with an arrow; WebVTT's header, notes and styles have none."""
    webvtt = source.suffix.lower() == ".vtt"
    cues = []
    for block in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n").replace("\r", "\n")):
        lines = block.strip().split("\n")
        at = next((index for index, line in enumerate(lines) if "-->" in line), None)
        if at is None or (webvtt and lines[0].startswith(("NOTE", "STYLE"))):
            continue
        times = _ARROW.search(lines[at])
        if times is None:
            raise ValueError(f"captions: expected hh:mm:ss --> hh:mm:ss in {source}; got {lines[at]!r}. Mend the line.")
        said = "\n".join(lines[at + 1 :]).strip()
        if webvtt:
            said = html.unescape(re.sub(r"<[^>]*>", "", said))
        cues.append(Cue(_seconds(times[1]), _seconds(times[2]), said))
    if not cues and text.strip() not in ("", "WEBVTT"):
        raise ValueError(f"captions: expected captions with times in {source}; got none. Is it the right file?")
    return cues


def _seconds(clock: str) -> float:
    total = 0.0
    for part in clock.replace(",", ".").split(":"):
        total = total * 60 + float(part)
    return total
