"""The published files of streaming training data: a conversation a line, and the places of the lines beside it.

`NAME.jsonl` has a JSON list `[user, assistant]` in each line; `NAME_seeks.jsonl` one JSON list of byte offsets. A
single line of millions is then read without reading those before it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from ..files import number, replacing
from .chunks import Asked, Chunk, Word


def seeks_of(path: str | os.PathLike[str]) -> Path:
    """Where the places of the lines of a file are kept."""
    source = Path(path)
    return source.with_name(f"{source.stem}_seeks.jsonl")


def write(path: str | os.PathLike[str], chunks: Iterable[Chunk]) -> int:
    """Write pieces and the places of their lines; a failure leaves the old files.

    Returns:
        How many there were.
    """
    target, offsets = Path(path), []
    with replacing(seeks_of(target)) as places:
        with replacing(target) as scratch, open(scratch, "wb") as stream:
            for chunk in chunks:
                offsets.append(stream.tell())
                stream.write(json.dumps(to_line(chunk), ensure_ascii=False, allow_nan=False).encode() + b"\n")
        with open(places, "w", encoding="utf-8") as stream_of_places:
            stream_of_places.write(json.dumps(offsets) + "\n")
    return len(offsets)


class Lines(Sequence[Chunk]):
    """The pieces of a file, read one by one when they are asked for.

    Args:
        path: of the JSONL file. Without its `_seeks.jsonl` it is read through once.

    Raises:
        FileNotFoundError: no such file.
        ValueError: places that do not fit it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"training data: expected a .jsonl file; got {self.path}, which is none.")
        self._size = self.path.stat().st_size
        places = seeks_of(self.path)
        self._offsets = _read_places(places, self._size) if places.is_file() else _find_places(self.path)

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Chunk: ...

    @overload
    def __getitem__(self, index: slice) -> list[Chunk]: ...

    def __getitem__(self, index: int | slice) -> Chunk | list[Chunk]:
        """One piece, or several.

        Raises:
            IndexError: no such line.
            ValueError: the line is none of this format, or does not lie where the places say.
        """
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        begin = self._offsets[index]
        end = self._offsets[index + 1] if index + 1 < len(self) else self._size
        with self.path.open("rb") as stream:
            stream.seek(begin)
            line = stream.read(end - begin).rstrip(b"\n")
        if b"\n" in line:
            raise ValueError(
                f"training data: expected line {index + 1} of {self.path} at byte {begin}; got several lines. "
                f"Delete {seeks_of(self.path).name}, which was made for another file."
            )
        try:
            return from_line(json.loads(line))
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise ValueError(
                f"training data: expected [user, assistant] in line {index + 1} of {self.path}; got "
                f"{line[:80].decode(errors='replace')!r} ({type(error).__name__}: {error}). Mend or leave out the line."
            ) from error


def _read_places(places: Path, size: int) -> list[int]:
    try:
        offsets = json.loads(places.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"training data: expected a JSON list in {places}; got {error}. Delete it.") from error
    fits = isinstance(offsets, list) and all(type(offset) is int for offset in offsets)
    if not fits or offsets != sorted(set(offsets)) or offsets[:1] != [0][: bool(size)] or offsets[-1:] >= [size or 1]:
        raise ValueError(
            f"training data: expected the places of lines in {size:,} bytes in {places}; got {str(offsets)[:80]}. "
            "Delete it."
        )
    return list(offsets)


def _find_places(path: Path) -> list[int]:
    offsets, at = [], 0
    with path.open("rb") as stream:
        for line in stream:
            if line.strip():
                offsets.append(at)
            at += len(line)
    return offsets


def to_line(chunk: Chunk) -> list[dict[str, Any]]:
    """A piece as the published format has it."""
    video = {"type": "video", "video": chunk.video, "video_start": chunk.start, "video_end": chunk.end}
    said: dict[str, Any] = {"type": "text_stream", "text_stream": [[w.start, w.end, w.text] for w in chunk.words]}
    if chunk.asked:
        said["qa_stream"] = [[a.tag, a.t, a.question, a.answer] for a in chunk.asked]
    return [
        {"role": "user", "content": [video, {"type": "text", "text": chunk.query, "previous": chunk.previous}]},
        {"role": "assistant", "content": [said]},
    ]


def from_line(line: Any) -> Chunk:
    """What the published format says; fields that it does not have are left out.

    Raises:
        ValueError: times that do not fit.
        TypeError: something of another type.
        KeyError: something that is missing.
    """
    user, assistant = ({part["type"]: part for part in turn["content"]} for turn in line)
    video, text, said = user["video"], user["text"], assistant["text_stream"]
    return Chunk(
        video=_text(video["video"]),
        start=number(video["video_start"]),
        end=number(video["video_end"]),
        query=_text(text["text"]),
        previous=_text(text.get("previous") or ""),
        words=tuple(Word(number(start), number(end), _text(word)) for start, end, word in said["text_stream"]),
        asked=tuple(Asked(tag, number(t), _text(q), _text(a)) for tag, t, q, a in said.get("qa_stream") or ()),
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} in place of a text")
    return value


class Rows(Sequence[dict[str, Any]]):
    """Pieces as rows of a table, which is what `Trainer` and `datasets` take."""

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self._chunks = chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: Any) -> Any:
        found = self._chunks[index]
        return [each.to_row() for each in found] if isinstance(index, slice) else found.to_row()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (chunk.to_row() for chunk in self._chunks)
