"""Caption files that grow with the stream and are valid after every event: SRT, WebVTT, JSONL."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from .events import Event

_SHORTEST_S = 1.0  # an answer has no length of its own


class CaptionFile:
    """One file, opened for writing. What is in it ends with a whole caption, even after a full disk.

    Args:
        path: a new file; its folder is made if need be.
        form: `srt`, `vtt` or `jsonl`.
        overwrite: replace a file that is there.

    Attributes:
        path: of the file.
        written: captions in it.

    Raises:
        FileExistsError: there is one, and `overwrite` is False.
        OSError: it cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], form: str, overwrite: bool = False) -> None:
        self.path, self.written = Path(path).expanduser(), 0
        self._form, self._shown, self._last_t = form, 0, 0.0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if overwrite else os.O_EXCL) | getattr(os, "O_BINARY", 0)
        try:
            self._file: int | None = os.open(self.path, flags, 0o644)
        except FileExistsError as error:
            raise FileExistsError(
                f"captions: expected a new file; got {self.path}, which exists. Choose another, or overwrite it."
            ) from error
        self._end = 0
        if form == "vtt":
            self._write("WEBVTT\n\n")

    def add(self, event: Event) -> None:
        """Write one event; subtitles leave out silence, JSONL has every event.

        Raises:
            ValueError: the file was closed.
            OSError: it could not be written. The file was closed, with all captions before this one.
        """
        text = {"srt": self._srt, "vtt": self._vtt, "jsonl": _line}[self._form](event)
        if text:
            self._write(text)
            self.written += 1

    def _write(self, text: str) -> None:
        """All of a text, or none of it."""
        if self._file is None:
            raise ValueError(f"captions: expected an open file; got {self.path}, which was closed.")
        rest = text.encode()
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            os.ftruncate(self._file, self._end)
            self.close()
            raise OSError(
                error.errno,
                f"captions: expected to write {self.path}; got: {error.strerror}. "
                f"Its {self.written} captions so far are kept.",
            ) from error
        self._end += len(text.encode())

    def _srt(self, event: Event) -> str:
        lines = [line.replace("-->", "->") for line in _lines(event.text)]
        start, end = self._span(event)
        self._shown += bool(lines)
        return _cue(f"{self._shown}\n", start, end, ",", lines)

    def _vtt(self, event: Event) -> str:
        lines = [line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") for line in _lines(event.text)]
        return _cue("", *self._span(event), ".", lines)

    def _span(self, event: Event) -> tuple[float, float]:
        """Seconds of the caption: starts never go back, and it lasts for a moment."""
        self._last_t = start = max(event.t, self._last_t)
        return start, event.t_end if event.t_end > start else start + _SHORTEST_S

    def close(self) -> None:
        """Close the file; what was written reaches the disk."""
        if self._file is not None:
            handle, self._file = self._file, None
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _lines(text: str) -> list[str]:
    """Lines that are not empty, without control characters: an empty line would end the caption."""
    lines = re.split(r"\r\n|[\n\r\x0b\x0c\x85\u2028\u2029]", text)
    cleaned = ("".join(c for c in line if c == "\t" or c.isprintable()).strip() for line in lines)
    return [line for line in cleaned if line]


def _cue(head: str, start: float, end: float, point: str, lines: list[str]) -> str:
    if not lines:
        return ""
    return f"{head}{clock(start, point)} --> {clock(end, point)}\n" + "\n".join(lines) + "\n\n"


def _line(event: Event) -> str:
    """An object on a line; what some readers take for a line end too is escaped."""
    written = json.dumps(event.to_dict(), ensure_ascii=False, allow_nan=False)
    return re.sub("[\x85\u2028\u2029]", lambda found: f"\\u{ord(found[0]):04x}", written) + "\n"


def clock(seconds: float, point: str) -> str:
    """`hh:mm:ss.mmm`, hours as many digits as they need."""
    whole, ms = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}{point}{ms:03}"


class Captions:
    """Several files of one stream, written together; a context manager that closes them.

    Args:
        srt: SubRip file.
        vtt: WebVTT file.
        jsonl: a JSON object a line: the fields of `Event`.
        overwrite: replace files that are there.

    Raises:
        ValueError: one path for two files.
        FileExistsError: a file is there, and `overwrite` is False; none was made.
        OSError: a file cannot be made.
    """

    def __init__(
        self,
        srt: str | os.PathLike[str] | None = None,
        vtt: str | os.PathLike[str] | None = None,
        jsonl: str | os.PathLike[str] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        self.files: list[CaptionFile] = []
        try:
            for form, path in check_places({"srt": srt, "vtt": vtt, "jsonl": jsonl}, overwrite).items():
                self.files.append(CaptionFile(path, form, overwrite))
        except OSError:
            self.close()
            raise

    def add(self, event: Event) -> None:
        """Write one event into every file.

        Raises:
            ValueError: an event of a second stream.
            OSError: a file could not be written; every file is valid and has all captions before this one.
        """
        if event.stream:
            raise ValueError(f"captions: expected events of one stream; got stream {event.stream}. Use files for each.")
        _each([lambda file=file: file.add(event) for file in self.files])  # type: ignore[misc]

    def close(self) -> None:
        """Close all files."""
        _each([file.close for file in self.files])

    def __enter__(self) -> Captions:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def check_places(asked: Mapping[str, str | os.PathLike[str] | None], overwrite: bool) -> dict[str, Path]:
    """Paths by format, of those that are asked for; touches nothing.

    Raises:
        ValueError: one path for two files.
        FileExistsError: a file is there, and `overwrite` is False.
    """
    places = {form: Path(path).expanduser().absolute() for form, path in asked.items() if path is not None}
    named = list(places.values())
    if len(set(named)) < len(named):
        raise ValueError(f"captions: expected a file for each format; got {named[0]} twice. Name them apart.")
    there = [place for place in named if place.exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"captions: expected new files; got {there[0]}, which exists. Choose another, or overwrite it."
        )
    return places


def _each(calls: list[Callable[[], None]]) -> None:
    """Do all, then raise the first error: one full disk must not cost the file on another."""
    first: OSError | None = None
    for call in calls:
        try:
            call()
        except OSError as error:
            first = first or error
    if first is not None:
        raise first
